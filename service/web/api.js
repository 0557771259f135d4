// The service's HTTP API, and what it says when something goes wrong.
// Addresses are relative, so that the page also works below a path of a reverse proxy.

/** An answer that was an error, or no answer at all; `message` is meant for people. */
export class ServiceError extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    this.name = "ServiceError";
    this.status = status;
    this.code = code;
    this.param = param;
  }

  /** Whether the picture itself was refused, whatever was asked of it. */
  get isAboutPicture() {
    return [413, 415].includes(this.status) || /^(image|body)\b/.test(this.param ?? "");
  }
}

/** Told of an answer that no key, or a wrong one, was given: the page asks for another. */
export const refusals = new EventTarget();

const KEY = "dinoscope-key"; // until the tab is closed

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

/** The headers that show the key, none where there is none. */
export function authorization() {
  return hasKey() ? { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` } : {};
}

/** Gives out one signal at a time: asking for the next aborts the work of the one before. */
export class Latest {
  #controller = new AbortController();

  next() {
    this.cancel();
    this.#controller = new AbortController();
    return this.#controller.signal;
  }

  cancel() {
    this.#controller.abort();
  }
}

export async function getModel(signal) {
  const { data } = await request("v1/models", { signal });
  return data[0];
}

export async function getCollections(signal) {
  const { collections } = await request("v1/collections", { signal });
  return collections;
}

/** The API's description, as OpenAPI has it. */
export function getDescription() {
  return request("openapi.json");
}

/** The stored thumbnail, or null where there is none. */
export async function getThumbnail(collection, id, signal) {
  const names = [collection, "thumbnails", id].map(encodeURIComponent);
  try {
    return await request(`v1/collections/${names.join("/")}`, { signal, as: "blob" });
  } catch (error) {
    if (error instanceof ServiceError && error.status === 404) return null;
    throw error;
  }
}

/** One map as a PNG; `options` are the query parameters, undefined ones left out. */
export function postAttention(picture, options, signal) {
  return request(`v1/attention?${query(options)}`, { body: form(picture), signal, as: "blob" });
}

export async function searchByPicture(collection, picture, k, signal) {
  const address = `v1/collections/${encodeURIComponent(collection)}/search?${query({ k })}`;
  return (await request(address, { body: form(picture), signal })).matches;
}

export async function searchById(collection, id, k, signal) {
  const address = `v1/collections/${encodeURIComponent(collection)}/search`;
  const body = JSON.stringify({ id, k });
  const headers = { "Content-Type": "application/json" };
  return (await request(address, { body, headers, signal })).matches;
}

/** Adds one picture; its id is made from its content. Gives its id and the outcome. */
export async function addPicture(collection, picture, name) {
  const body = form(picture, name);
  body.append("metadata", JSON.stringify({ name }));
  const address = `v1/collections/${encodeURIComponent(collection)}/images`;
  const [stored] = (await request(address, { body })).images;
  if (stored.error) throw new ServiceError(stored.error.message, stored.error);
  return stored;
}

function form(picture, name = "picture") {
  const fields = new FormData();
  fields.append("image", picture, name);
  return fields;
}

function query(options) {
  const given = Object.entries(options).filter(([, value]) => value !== undefined);
  return new URLSearchParams(given).toString();
}

async function request(address, { body, headers, signal, as = "json" } = {}) {
  try {
    const method = body === undefined ? "GET" : "POST";
    const shown = { ...headers, ...authorization() };
    const response = await fetch(address, { method, body, headers: shown, signal });
    if (response.status === 401) refusals.dispatchEvent(new Event("refusal"));
    if (!response.ok) throw await errorOf(response);
    const answer = await response[as]();
    signal?.throwIfAborted();
    return answer;
  } catch (error) {
    if (signal?.aborted || error instanceof ServiceError) throw error;
    if (error instanceof SyntaxError) {
      throw new ServiceError("The service gave an answer that is not JSON.");
    }
    throw new ServiceError(
      "The service does not answer: it is not running, it cannot be reached from here, " +
        "or it closed the connection.",
    );
  }
}

async function errorOf(response) {
  const { status } = response;
  try {
    const { message, code, param } = (await response.json()).error;
    return new ServiceError(message, { status, code, param });
  } catch {
    return new ServiceError(`The service answered with status ${status}, and without a reason.`, {
      status,
    });
  }
}
