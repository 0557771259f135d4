"""DINO pretraining, its evaluations, and the export of the teacher's backbone."""
