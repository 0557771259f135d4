// What stands on the page: small pieces of the document that know nothing of the service.
// Text is always set as text, never as markup.

export function element(tag, { text, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

/** A box for an error, with a button to try again where that makes sense. */
export class ErrorBox {
  #box;

  constructor(box) {
    this.#box = box;
  }

  show(message, retry) {
    const parts = [element("span", { text: message })];
    if (retry) {
      const button = element("button", { type: "button", text: "Try again" });
      button.addEventListener("click", retry);
      parts.push(button);
    }
    this.#box.replaceChildren(...parts);
    this.#box.hidden = false;
  }

  clear() {
    this.#box.hidden = true;
    this.#box.replaceChildren();
  }
}

/** An <img> that owns the object URL it shows, and gives it back when it shows another. */
export class BlobImage {
  #image;
  #url = null;

  constructor(image) {
    this.#image = image;
  }

  /** Shows the picture; false where the browser cannot draw its format. */
  async show(blob, alt) {
    const url = URL.createObjectURL(blob);
    const before = this.#url;
    this.#url = url;
    this.#image.alt = alt;
    this.#image.src = url;
    if (before) URL.revokeObjectURL(before);
    try {
      await this.#image.decode();
    } catch {
      if (this.#url === url) this.clear();
      return false;
    }
    if (this.#url !== url) return true; // another one came meanwhile
    this.#image.hidden = false;
    return true;
  }

  get ratio() {
    return this.#image.naturalWidth / this.#image.naturalHeight || 1;
  }

  clear() {
    this.#image.hidden = true;
    this.#image.removeAttribute("src");
    this.#image.alt = "";
    if (this.#url) URL.revokeObjectURL(this.#url);
    this.#url = null;
  }
}

/** One attention map with its caption; its box has its size before there is a picture. */
export class MapTile {
  constructor(head, caption) {
    this.head = head;
    this.caption = caption;
    const image = element("img", { hidden: true, alt: "" });
    this.image = new BlobImage(image);
    this.figure = element(
      "figure",
      {},
      element("div", { className: "tile" }, image),
      element("figcaption", { text: caption }),
    );
  }

  set busy(busy) {
    this.figure.setAttribute("aria-busy", String(busy));
  }
}

/** Where a picture stands on the screen within its <img>, which it need not fill. */
export function shownBox(image) {
  const box = image.getBoundingClientRect();
  const scale = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
  const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
  return {
    left: box.left + (box.width - width) / 2,
    top: box.top + (box.height - height) / 2,
    width,
    height,
  };
}

/** A mark over a point of a picture, which stays there when the picture's size changes. */
export class PointMarker {
  #image;
  #mark;
  #point = null;

  /** `mark` lies in the same box as `image`. */
  constructor(image, mark) {
    this.#image = image;
    this.#mark = mark;
    new ResizeObserver(() => this.#place()).observe(image.parentElement);
  }

  /** `point` is in fractions of the picture's width and height; null takes the mark away. */
  show(point) {
    this.#point = point;
    this.#place();
  }

  #place() {
    this.#mark.hidden = !this.#point || this.#image.hidden || !this.#image.naturalWidth;
    if (this.#mark.hidden) return;
    const outer = this.#image.parentElement.getBoundingClientRect();
    const { left, top, width, height } = shownBox(this.#image);
    this.#mark.style.left = `${left - outer.left + this.#point.x * width}px`;
    this.#mark.style.top = `${top - outer.top + this.#point.y * height}px`;
  }
}

/** The form that asks for a key; `onKey(key)` takes what was given. */
export class KeyForm {
  #form = document.getElementById("key-form");
  #input = document.getElementById("key");

  constructor(onKey) {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      onKey(this.#input.value.trim());
      this.#input.value = "";
    });
  }

  show(text) {
    document.getElementById("key-text").textContent = text;
    if (!this.#form.hidden) return; // someone may be typing
    this.#form.hidden = false;
    this.#input.focus();
  }

  hide() {
    this.#form.hidden = true;
  }
}

/** One neighbour as a button: its thumbnail (an <img>), what it is called, and its score. */
export function matchItem(match, image, onChoose) {
  const label = nameOf(match);
  const detail = label === match.id ? [] : [detailLine(match.id)];
  const button = element(
    "button",
    { type: "button", className: "match", title: `Search with ${match.id}` },
    element("span", { className: "thumbnail" }, image),
    element("span", { className: "match-name", text: label }),
    ...detail,
    detailLine(`score ${match.score.toFixed(3)}`),
  );
  button.dataset.id = match.id;
  button.addEventListener("click", () => onChoose(match));
  return element("li", {}, button);
}

/** As many empty boxes as there may be matches, so that nothing moves when they come. */
export function emptyMatches(count) {
  return Array.from({ length: count }, () => {
    const lines = ["match-name", "match-detail"].map((className) =>
      element("span", { className, text: "\u00a0" }),
    );
    const box = element("span", { className: "thumbnail" });
    const button = element("button", { className: "match", disabled: true }, box, ...lines);
    return element("li", { ariaHidden: "true" }, button);
  });
}

/** What people call it: the `name` of its metadata where its id does not say it already. */
export function nameOf(match) {
  const name = match.metadata?.name;
  return typeof name === "string" && name && !match.id.endsWith(name) ? name : match.id;
}

function detailLine(text) {
  return element("span", { className: "match-detail", text });
}
