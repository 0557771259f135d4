// The API's description, drawn by Swagger UI. A key that was given on the page is used here too.

import * as api from "./api.js";
import { KeyForm } from "./views.js";

const error = document.getElementById("error");
const keyForm = new KeyForm((key) => {
  api.setKey(key);
  load();
});

async function load() {
  error.hidden = true;
  try {
    const spec = await api.getDescription();
    keyForm.hide();
    window.SwaggerUIBundle({
      spec,
      dom_id: "#swagger-ui",
      deepLinking: true,
      requestInterceptor: (request) => {
        request.headers = { ...api.authorization(), ...request.headers };
        return request;
      },
    });
  } catch (failure) {
    if (failure.status === 401) {
      keyForm.show("This service asks for a key.");
    } else {
      error.textContent = failure.message;
      error.hidden = false;
    }
  }
}

load();
