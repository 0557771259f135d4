// The attention panel: one map per head and their mean, and how they are drawn.

import { Latest, postAttention } from "./api.js";
import { ErrorBox, MapTile } from "./views.js";

const MAP_PIXELS = 480; // long side of each map
const REDRAW_DELAY_MS = 200; // a slider is still being moved

const $ = (id) => document.getElementById(id);

export class AttentionPanel {
  #tiles = [];
  #shown = null; // {picture: Promise<Blob | null>, name}
  #latest = new Latest();
  #errors = new ErrorBox($("attention-error"));
  #headsNote = $("attention-note").textContent;
  #idleNote = this.#headsNote;
  #onError;
  #resolution;

  /** `onError(error, box, retry)` says what went wrong. */
  constructor(onError) {
    this.#onError = onError;
    this.#listen();
    this.#showDrawing();
  }

  /** A convolutional network has no heads: there is nothing to draw, and the note says why. */
  setModel({ heads: count, max_resolution: resolution }) {
    this.#resolution = resolution; // maps as fine as the service makes them
    this.#idleNote = count
      ? this.#headsNote
      : "This model is a convolutional network, which has no attention to show";
    this.clear();
    const heads = Array.from({ length: count }, (_, i) => new MapTile(i, `Head ${i}`));
    this.#tiles = count ? [new MapTile("mean", "Mean of all heads"), ...heads] : [];
    for (const id of ["colormap", "overlay", "threshold"]) $(id).disabled = count === 0;
    $("maps").replaceChildren(...this.#tiles.map((tile) => tile.figure));
  }

  show(picture, { name, file }) {
    if (!this.#tiles.length) return;
    this.#shown = { picture, name };
    $("attention-note").textContent = file ? this.#idleNote : "Drawn from the stored thumbnail";
    this.#draw();
  }

  clear() {
    this.#latest.cancel();
    this.#shown = null;
    this.#errors.clear();
    $("attention-note").textContent = this.#idleNote;
    for (const tile of this.#tiles) {
      tile.image.clear();
      tile.busy = false;
    }
  }

  /** The maps' boxes take the picture's shape, but stay boxes for a very long or tall one. */
  setRatio(ratio) {
    const bounded = Math.min(2, Math.max(0.5, ratio));
    $("maps").style.setProperty("--ratio", bounded.toFixed(2));
  }

  async #draw() {
    const signal = this.#latest.next();
    const { picture, name } = this.#shown;
    this.#errors.clear();
    for (const tile of this.#tiles) tile.busy = true;
    try {
      const blob = await picture.catch(() => undefined); // why not is told beside the picture
      if (signal.aborted) return;
      if (blob === null) {
        $("attention-note").textContent = "No thumbnail is stored, so there is nothing to draw";
      } else if (blob) {
        await Promise.all(this.#tiles.map((tile) => this.#drawOne(tile, blob, name, signal)));
      }
    } catch (error) {
      if (signal.aborted) return;
      this.#latest.cancel(); // one reason is enough, and the other heads have the same
      for (const tile of this.#tiles) tile.image.clear();
      this.#onError(error, this.#errors, () => this.#draw());
    }
    for (const tile of this.#tiles) tile.busy = false;
  }

  async #drawOne(tile, blob, name, signal) {
    const options = { head: tile.head, resolution: this.#resolution, ...drawing() };
    const png = await postAttention(blob, options, signal);
    await tile.image.show(png, `${tile.caption}: attention over ${name}`);
    if (signal.aborted) return;
    this.setRatio(tile.image.ratio);
    tile.busy = false;
  }

  #listen() {
    let timer = 0;
    const redraw = () => this.#shown && this.#draw();
    for (const id of ["overlay", "threshold"]) {
      $(id).addEventListener("input", () => {
        this.#showDrawing();
        clearTimeout(timer);
        timer = setTimeout(redraw, REDRAW_DELAY_MS);
      });
    }
    $("colormap").addEventListener("change", redraw);
  }

  #showDrawing() {
    const threshold = $("threshold").value;
    $("overlay-value").textContent = `${$("overlay").value} %`;
    $("threshold-value").textContent = threshold === "100" ? "all" : `${threshold} %`;
  }
}

function drawing() {
  const threshold = Number($("threshold").value) / 100;
  return {
    colormap: $("colormap").value,
    overlay: Number($("overlay").value) / 100,
    threshold: threshold < 1 ? threshold : undefined,
    size: MAP_PIXELS,
  };
}
