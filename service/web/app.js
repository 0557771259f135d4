// The page: a picture, where the network looks in it, and what lies closest to it.

import * as api from "./api.js";
import { AttentionPanel } from "./attention.js";
import { BlobImage, ErrorBox, KeyForm, element, emptyMatches, matchItem, nameOf } from "./views.js";

const NEIGHBOURS = 12;

const $ = (id) => document.getElementById(id);
const errors = {
  service: new ErrorBox($("service-error")),
  picture: new ErrorBox($("picture-error")),
  neighbours: new ErrorBox($("neighbours-error")),
};
const latest = {
  service: new api.Latest(),
  subject: new api.Latest(),
  neighbours: new api.Latest(),
};
const preview = new BlobImage($("preview"));
const attention = new AttentionPanel(showFailure);
const keyForm = new KeyForm((key) => {
  api.setKey(key);
  loadService();
});
const hints = {
  frame: $("frame-hint").textContent,
  neighbours: $("neighbours-note").textContent,
};

let model = null;
let collections = [];
let adding = false;
let thumbnails = []; // of the neighbours that are shown

// A subject is what is searched with: {name, file} for a picture from outside, {name, id,
// collection} for one of a collection. Each is one step of the browser's history.
const visit = performance.timeOrigin; // steps of a page that was reloaded are not ours
let subjects = [];
let step = -1;
let picture = Promise.resolve(null); // the current subject's bytes, null where there are none

// ---- The service: its model and its collections -------------------------------------------

async function loadService() {
  const signal = latest.service.next();
  errors.service.clear();
  try {
    const [found, list] = await Promise.all([api.getModel(signal), api.getCollections(signal)]);
    if (signal.aborted) return;
    keyForm.hide();
    showModel(found);
    showCollections(list);
    if (subjects[step]) present(); // chosen before there was anyone to ask
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 401) return; // the form asks for a key
    errors.service.show(error.message, loadService);
  }
}

/** Counts change, and collections come and go, while the page is open. */
async function refreshCollections() {
  const signal = latest.service.next();
  try {
    const list = await api.getCollections(signal);
    const before = $("collection").value;
    errors.service.clear();
    showCollections(list);
    if (subjects[step] && before !== $("collection").value) findNeighbours();
  } catch (error) {
    if (!signal.aborted) errors.service.show(error.message, loadService);
  }
}

function showModel(found) {
  model = found;
  $("fact-model").textContent = `${found.id} (${found.architecture})`;
  $("fact-embedding").textContent = `${found.embedding_size} numbers`;
  attention.setModel(found);
}

function showCollections(list) {
  collections = list;
  const select = $("collection");
  const chosen = select.value;
  const options = list.map(({ name, model: made }) => {
    const foreign = model && made !== model.fingerprint;
    return element("option", { value: name, text: foreign ? `${name} (another model)` : name });
  });
  select.replaceChildren(...options);
  select.disabled = list.length === 0;
  const names = list.map(({ name }) => name);
  const wanted = [chosen, "default", names[0]].find((name) => names.includes(name));
  if (wanted !== undefined) select.value = wanted;
  showCollectionFacts();
}

function showCollectionFacts() {
  const current = collections.find(({ name }) => name === $("collection").value);
  const count = current?.count ?? 0;
  $("fact-collection").textContent = current
    ? `${current.name}: ${count} ${count === 1 ? "picture" : "pictures"}`
    : "none";
  $("add").textContent = current ? `Add to “${current.name}”` : "Add to the collection";
  updateButtons();
}

function updateButtons() {
  const back = $("back");
  if (step < 0 && document.activeElement === back) $("file").focus();
  back.disabled = step < 0;
  $("add").disabled = adding || !subjects[step]?.file || collections.length === 0;
}

// ---- The subject --------------------------------------------------------------------------

function open(subject) {
  step += 1;
  subjects = [...subjects.slice(0, step), subject];
  history.pushState({ visit, step }, "");
  present();
}

/** Shows the current step from the start: its picture, its maps, its neighbours. */
function present() {
  const subject = subjects[step];
  const signal = latest.subject.next();
  errors.picture.clear();
  errors.neighbours.clear();
  attention.clear();
  preview.clear();
  say("");
  updateButtons();
  $("frame").classList.toggle("filled", Boolean(subject));
  $("picture-name").textContent = subject?.name ?? "\u00a0";
  $("picture-name").title = subject?.name ?? "";
  if (!subject) {
    presentNothing();
    return;
  }
  $("frame-hint").textContent = "";
  picture = subject.file
    ? Promise.resolve(subject.file)
    : api.getThumbnail(subject.collection, subject.id, signal);
  showPreview(subject, signal);
  attention.show(picture, subject);
  findNeighbours();
}

function presentNothing() {
  latest.neighbours.cancel();
  busy($("frame"), false);
  busy($("matches"), false);
  picture = Promise.resolve(null);
  $("frame-hint").textContent = hints.frame;
  $("neighbours-note").textContent = hints.neighbours;
  replaceMatches([]);
}

async function showPreview(subject, signal) {
  busy($("frame"), true);
  try {
    const blob = await picture;
    const shown = blob !== null && (await preview.show(blob, `The chosen picture, ${subject.name}`));
    if (signal.aborted) return;
    if (shown) {
      attention.setRatio(preview.ratio);
    } else {
      $("frame-hint").textContent = blob
        ? "This browser cannot show the file."
        : "No thumbnail is stored for this picture.";
    }
  } catch (error) {
    if (signal.aborted) return;
    $("frame-hint").textContent = "The picture could not be loaded.";
    errors.picture.show(error.message, present);
  }
  busy($("frame"), false);
}

async function openFile(file, count = 1) {
  try {
    await file.slice(0, 1).arrayBuffer(); // a folder, or a file that has gone, fails here
  } catch {
    errors.picture.show(`“${file.name}” cannot be read; is it a folder?`);
    return;
  }
  open({ name: file.name || "pasted picture", file });
  if (count > 1) say(`Only the first of ${count} files is used.`);
}

// ---- Neighbours ---------------------------------------------------------------------------

async function findNeighbours() {
  const signal = latest.neighbours.next();
  const subject = subjects[step];
  const collection = $("collection").value;
  errors.neighbours.clear();
  if (collections.length === 0) {
    // Not loaded: the reason stands above. Otherwise there are none.
    $("neighbours-note").textContent = model ? "There is no collection to search in." : "";
    return;
  }
  $("neighbours-note").textContent = "Searching…";
  if (!$("matches").childElementCount) $("matches").append(...emptyMatches(NEIGHBOURS));
  busy($("matches"), true);
  try {
    const matches = await search(subject, collection, signal);
    if (signal.aborted) return;
    showMatches(matches, subject, collection, signal);
  } catch (error) {
    if (signal.aborted) return;
    replaceMatches([]);
    $("neighbours-note").textContent = "Nothing to show.";
    showFailure(error, errors.neighbours, present);
  }
  busy($("matches"), false);
}

async function search(subject, collection, signal) {
  if (subject.collection === collection) {
    return api.searchById(collection, subject.id, NEIGHBOURS, signal);
  }
  const blob = await picture;
  if (blob === null) {
    throw new api.ServiceError(
      `“${subject.name}” lies in “${subject.collection}” and has no thumbnail to search with.`,
    );
  }
  return api.searchByPicture(collection, blob, NEIGHBOURS, signal);
}

function showMatches(matches, subject, collection, signal) {
  const images = matches.map(() => element("img", { alt: "", draggable: false, hidden: true }));
  const items = matches.map((match, i) =>
    matchItem(match, images[i], () => open({ name: nameOf(match), id: match.id, collection })),
  );
  // The element with the focus goes away; someone on the keyboard goes on from the first.
  const hadFocus = $("matches").contains(document.activeElement);
  replaceMatches(items);
  thumbnails = images.map((image) => new BlobImage(image));
  matches.forEach(({ id }, i) => showThumbnail(images[i], thumbnails[i], collection, id, signal));
  if (hadFocus) items[0]?.firstElementChild.focus({ preventScroll: true });
  $("neighbours-note").textContent = matches.length
    ? `${matches.length} nearest to “${subject.name}” in “${collection}”, by cosine similarity`
    : `“${collection}” holds no ${subject.file ? "" : "other "}picture yet.`;
}

function replaceMatches(items) {
  for (const thumbnail of thumbnails) thumbnail.clear();
  thumbnails = [];
  $("matches").replaceChildren(...items);
}

/** Fetched here, not by the <img>, which could not show a key. */
async function showThumbnail(image, thumbnail, collection, id, signal) {
  try {
    const blob = await api.getThumbnail(collection, id, signal);
    if (blob !== null && (await thumbnail.show(blob, ""))) return;
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof api.ServiceError)) throw error;
  }
  image.replaceWith("no thumbnail");
}

// ---- Adding -------------------------------------------------------------------------------

async function add() {
  const { file, name } = subjects[step];
  const collection = $("collection").value;
  adding = true;
  updateButtons();
  errors.picture.clear();
  say(`Adding “${name}” to “${collection}”…`);
  try {
    const { outcome } = await api.addPicture(collection, file, name);
    await refreshCollections();
    if (subjects[step]?.file === file && $("collection").value === collection) {
      await findNeighbours();
    }
    say(
      outcome === "unchanged"
        ? `“${collection}” holds “${name}” already.`
        : `“${name}” is in “${collection}” now.`,
    );
  } catch (error) {
    say("");
    errors.picture.show(`“${name}” was not added: ${error.message}`);
  }
  adding = false;
  updateButtons();
}

// ---- What they share ----------------------------------------------------------------------

function showFailure(error, box, retry) {
  if (!(error instanceof api.ServiceError)) {
    console.error(error);
    box.show(`The page failed: ${error.message}`);
  } else if (error.isAboutPicture) errors.picture.show(error.message);
  else box.show(error.message, retry);
}

function say(text) {
  $("status").textContent = text;
}

function busy(target, is) {
  target.setAttribute("aria-busy", String(is));
}

function firstFile(transfer) {
  const files = [...(transfer?.files ?? [])];
  if (files.length) openFile(files[0], files.length);
  return files.length > 0;
}

function listen() {
  $("file").addEventListener("change", ({ target }) => {
    const [file] = target.files;
    if (file) openFile(file);
    target.value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("paste", ({ clipboardData }) => {
    if (!firstFile(clipboardData)) say("The clipboard holds no picture.");
  });
  document.addEventListener("dragenter", ({ dataTransfer }) => {
    if (dataTransfer?.types.includes("Files")) $("veil").hidden = false;
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("dragleave", ({ relatedTarget }) => {
    if (relatedTarget === null) $("veil").hidden = true; // it left the page
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("veil").hidden = true;
    if (!firstFile(event.dataTransfer)) say("What was dropped is no file.");
  });

  $("collection").addEventListener("change", () => {
    showCollectionFacts();
    if (subjects[step]) findNeighbours();
  });
  $("add").addEventListener("click", add);
  $("back").addEventListener("click", () => history.back());
  api.refusals.addEventListener("refusal", () => {
    keyForm.show(
      api.hasKey()
        ? "The service does not know this key. Give another."
        : "This service asks for a key.",
    );
  });
  window.addEventListener("popstate", ({ state }) => {
    step = state?.visit === visit ? state.step : -1;
    present();
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && model) refreshCollections();
  });
}

history.replaceState({ visit, step }, "");
listen();
loadService();
