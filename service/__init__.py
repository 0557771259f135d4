"""The microservice: embeddings, attention maps, similarity search and copies over HTTP."""
