// The panel of maps: the attention of a block head by head or of all blocks, and what the patches
// are like. A point of the picture, chosen by a click or in numbers, takes the place of CLS.

import { Latest, postAttention } from "./api.js";
import { ErrorBox, MapTile, PointMarker, shownBox } from "./views.js";

const MAP_PIXELS = 480; // long side of each map
const REDRAW_DELAY_MS = 200; // a slider is still being moved
const CENTRE = { x: 0.5, y: 0.5 };

// What each choice asks of the service, which controls have a part in it, and what stands above.
const VIEWS = {
  heads: {
    query: {},
    controls: ["block", "point", "colormap", "overlay", "threshold"],
    note: (from) => `Where ${from} looks, head by head`,
  },
  rollout: {
    query: { rollout: true },
    controls: ["point", "colormap", "overlay", "threshold"],
    note: (from) => `Where ${from} looks, rolled out over all blocks`,
    caption: "All blocks",
  },
  pca: {
    query: { view: "pca" },
    controls: ["overlay"],
    note: () => "The patches’ first three principal components as red, green and blue",
    caption: "Patches as colours",
  },
  similarity: {
    query: { view: "similarity" },
    controls: ["point", "colormap", "overlay"],
    note: () => "How alike each patch is to the one at the point",
    caption: "Likeness to the point",
  },
};
const CONTROLS = VIEWS.heads.controls; // all of them
const COORDINATES = ["point-x", "point-y"]; // the inputs of the control "point"
const NEED_ATTENTION = ["heads", "rollout"];

const $ = (id) => document.getElementById(id);

export class AttentionPanel {
  #tiles = [];
  #shown = null; // {picture: Promise<Blob | null>, name, file}
  #model = null;
  #latest = new Latest();
  #errors = new ErrorBox($("attention-error"));
  #marker = new PointMarker($("preview"), $("marker"));
  #onError;
  #timer = 0;
  #drawnPoint; // as text

  /** `onError(error, box, retry)` says what went wrong. */
  constructor(onError) {
    this.#onError = onError;
    this.#listen();
    this.#showDrawing();
  }

  /** A convolutional network has no attention: what its patches are like can still be drawn. */
  setModel(model) {
    this.#model = model;
    const { blocks, heads } = model;
    const numbers = Array.from({ length: blocks }, (_, i) => blocks - 1 - i);
    $("block").replaceChildren(
      ...numbers.map((i) => new Option(i === blocks - 1 ? `${i} (the last)` : i, i)),
    );
    for (const option of $("view").options) {
      option.disabled = !heads && NEED_ATTENTION.includes(option.value);
    }
    if (!heads) $("view").value = "pca";
    $("view").disabled = false;
    this.clear();
    this.#arrange();
  }

  show(picture, { name, file }) {
    this.#shown = { picture, name, file };
    if (this.#model) this.#draw();
  }

  clear() {
    this.#latest.cancel();
    clearTimeout(this.#timer);
    this.#shown = null;
    this.#errors.clear();
    this.#setPoint(null);
    this.#showNote();
    for (const tile of this.#tiles) {
      tile.image.clear();
      tile.busy = false;
    }
  }

  /** The maps' boxes take the picture's shape, but stay boxes for a very long or tall one. */
  setRatio(ratio) {
    const bounded = Math.min(2, Math.max(0.5, ratio));
    $("maps").style.setProperty("--ratio", bounded.toFixed(2));
    this.#showPoint(); // there is a picture now, on which it can stand
  }

  get #view() {
    return VIEWS[$("view").value];
  }

  /** The point as fractions of width and height; null is CLS, or the centre where there must be one. */
  get #point() {
    const [x, y] = COORDINATES.map($);
    if (x.value && y.value && x.validity.valid && y.validity.valid) {
      return { x: Number(x.value) / 100, y: Number(y.value) / 100 };
    }
    return this.#view === VIEWS.similarity ? CENTRE : null;
  }

  get #takesPoint() {
    return this.#view.controls.includes("point");
  }

  #setPoint(point) {
    $("point-x").value = point ? percent(point.x) : "";
    $("point-y").value = point ? percent(point.y) : "";
    this.#showPoint();
  }

  #showPoint() {
    const takesPoint = this.#takesPoint;
    this.#marker.show(this.#shown && takesPoint ? this.#point : null);
    for (const id of COORDINATES) {
      $(id).placeholder = this.#view === VIEWS.similarity ? "50" : "";
      $(id).ariaInvalid = String(!$(id).validity.valid);
    }
    $("no-point").disabled = !takesPoint || !COORDINATES.some((id) => $(id).value);
  }

  /** Tiles and controls for the chosen view. */
  #arrange() {
    const { caption, controls } = this.#view;
    for (const control of CONTROLS) {
      const ids = control === "point" ? COORDINATES : [control];
      for (const id of ids) $(id).disabled = !controls.includes(control);
    }
    for (const tile of this.#tiles) tile.image.clear();
    if (caption) {
      this.#tiles = [new MapTile(undefined, caption)];
    } else {
      const heads = Array.from({ length: this.#model.heads }, (_, i) => i);
      this.#tiles = [
        new MapTile("mean", "Mean of all heads"),
        ...heads.map((i) => new MapTile(i, `Head ${i}`)),
      ];
    }
    $("maps").replaceChildren(...this.#tiles.map((tile) => tile.figure));
    this.#showPoint();
    this.#showNote();
  }

  #showNote() {
    const hasAttention = this.#model?.heads !== 0;
    const parts = [this.#view.note(this.#point ? "the point’s patch" : "the CLS token")];
    if (!hasAttention) parts.push("this model is a convolutional network, which has no attention");
    if (!COORDINATES.every((id) => $(id).validity.valid)) {
      parts.push("a point’s x and y are numbers from 0 to 100");
    }
    if (this.#shown && !this.#shown.file) parts.push("drawn from the stored thumbnail");
    $("attention-note").textContent = parts.join("; ");
  }

  async #draw() {
    clearTimeout(this.#timer);
    const signal = this.#latest.next();
    this.#drawnPoint = pointText(this.#point);
    const { picture, name } = this.#shown;
    this.#errors.clear();
    this.#showNote();
    this.#showPoint();
    for (const tile of this.#tiles) tile.busy = true;
    try {
      const blob = await picture.catch(() => undefined); // why not is told beside the picture
      if (signal.aborted) return;
      if (blob === null) {
        $("attention-note").textContent = "No thumbnail is stored, so there is nothing to draw";
      } else if (blob) {
        await Promise.all(this.#tiles.map((tile) => this.#drawOne(tile, blob, name, signal)));
      }
      if (signal.aborted) return; // the tiles are another drawing's
    } catch (error) {
      if (signal.aborted) return;
      this.#latest.cancel(); // one reason is enough, and the other heads have the same
      for (const tile of this.#tiles) tile.image.clear();
      this.#onError(error, this.#errors, () => this.#draw());
    }
    for (const tile of this.#tiles) tile.busy = false;
  }

  async #drawOne(tile, blob, name, signal) {
    const png = await postAttention(blob, { head: tile.head, ...this.#options() }, signal);
    await tile.image.show(png, `${tile.caption}: ${$("attention-note").textContent}, in ${name}`);
    if (signal.aborted) return;
    this.setRatio(tile.image.ratio);
    tile.busy = false;
  }

  /** What is asked of the service, for the controls that have a part in the view. */
  #options() {
    const { query, controls } = this.#view;
    const threshold = Number($("threshold").value) / 100;
    const chosen = {
      block: $("block").value,
      point: pointText(this.#point),
      colormap: $("colormap").value,
      overlay: Number($("overlay").value) / 100,
      threshold: threshold < 1 ? threshold : undefined,
    };
    const options = { ...query, resolution: this.#model.max_resolution, size: MAP_PIXELS };
    for (const control of controls) options[control] = chosen[control];
    return options;
  }

  #listen() {
    const redraw = () => this.#shown && this.#model && this.#draw();
    const redrawSoon = () => {
      clearTimeout(this.#timer);
      this.#timer = setTimeout(redraw, REDRAW_DELAY_MS);
    };
    for (const id of ["overlay", "threshold"]) {
      $(id).addEventListener("input", () => {
        this.#showDrawing();
        redrawSoon();
      });
    }
    for (const id of COORDINATES) {
      $(id).addEventListener("input", () => {
        this.#showPoint();
        this.#showNote();
        if (pointText(this.#point) !== this.#drawnPoint) redrawSoon();
      });
    }
    for (const id of ["colormap", "block"]) $(id).addEventListener("change", redraw);
    $("view").addEventListener("change", () => {
      this.#arrange();
      redraw();
    });
    $("no-point").addEventListener("click", () => {
      this.#setPoint(null);
      $("point-x").focus(); // the button has nothing more to do
      redraw();
    });
    for (const id of ["preview", "maps"]) {
      $(id).addEventListener("click", (event) => {
        if (!(event.target instanceof HTMLImageElement)) return;
        if (!this.#shown || !this.#model || !this.#takesPoint) return;
        const point = pointIn(event.target, event);
        if (!point) return;
        this.#setPoint(point);
        redraw();
      });
    }
  }

  #showDrawing() {
    const threshold = $("threshold").value;
    $("overlay-value").textContent = `${$("overlay").value} %`;
    $("threshold-value").textContent = threshold === "100" ? "all" : `${threshold} %`;
  }
}

function percent(fraction) {
  return Number((100 * fraction).toFixed(2));
}

function pointText(point) {
  return point ? `${point.x.toFixed(4)},${point.y.toFixed(4)}` : undefined;
}

/** Where in a picture a click is, as fractions; null beside it, in the box that it is shown in. */
function pointIn(image, { clientX, clientY }) {
  const { left, top, width, height } = shownBox(image);
  const [x, y] = [(clientX - left) / width, (clientY - top) / height];
  return x >= 0 && x <= 1 && y >= 0 && y <= 1 ? { x, y } : null;
}
