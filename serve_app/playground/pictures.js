// Where pictures come from: files, drop, paste, the camera, samples.

import { root } from "./api.js";
import { $, el, toast } from "./dom.js";

const SAMPLES = ["coffee", "astronaut", "rocket"];
const sampleUrl = (name) => new URL(`playground/samples/${name}.jpg`, root).href;

/** The type under which an item of the history is dragged. */
export const ITEM = "text/x-imagen-item";

/** Call `onFiles(files)` with whatever comes in, and `onItem(id)` with what is dragged back. */
export function listen(onFiles, onItem) {
  const input = $("files");
  input.addEventListener("change", () => {
    onFiles([...input.files]);
    input.value = "";
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) onFiles([...event.clipboardData.files]);
  });
  let depth = 0;
  const over = (change) => (event) => {
    const types = event.dataTransfer?.types ?? [];
    if (!types.includes("Files") && !types.includes(ITEM)) return;
    event.preventDefault();
    depth += change;
    $("drop").classList.toggle("shown", depth > 0);
  };
  document.addEventListener("dragenter", over(1));
  document.addEventListener("dragleave", over(-1));
  document.addEventListener("dragover", over(0));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    $("drop").classList.remove("shown");
    const id = event.dataTransfer.getData(ITEM);
    if (id) onItem(id);
    else if (event.dataTransfer.files.length) onFiles([...event.dataTransfer.files]);
  });
  $("camera-button").addEventListener("click", () => photograph(onFiles));
}

export function showSamples(onFiles) {
  $("samples").replaceChildren(...SAMPLES.map((name) => {
    const image = el("img", { src: sampleUrl(name), alt: "", loading: "lazy", decoding: "async" });
    const button = el("button", { type: "button", onclick: () => fetchSample(name, onFiles) },
      image, el("span", { textContent: name }));
    return el("li", {}, button);
  }));
}

async function fetchSample(name, onFiles) {
  try {
    const answer = await fetch(sampleUrl(name));
    if (!answer.ok) throw new Error();
    onFiles([new File([await answer.blob()], `${name}.jpg`, { type: "image/jpeg" })]);
  } catch {
    toast("The sample could not be loaded. Check the connection and try again.");
  }
}

async function photograph(onFiles) {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: 1280 } });
  } catch {
    // Without TLS, or without a camera of the computer's, a phone's own camera may still do.
    $("files").setAttribute("capture", "environment");
    $("files").click();
    $("files").removeAttribute("capture");
    return;
  }
  const [dialog, video] = [$("camera-dialog"), $("video")];
  video.srcObject = stream;
  await video.play();
  dialog.returnValue = "";
  dialog.showModal();
  dialog.onclose = async () => {
    if (dialog.returnValue === "take") {
      const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
      canvas.getContext("2d").drawImage(video, 0, 0);
      const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
      onFiles([new File([blob], "camera.jpg", { type: blob.type })]);
    }
    for (const track of stream.getTracks()) track.stop();
    video.srcObject = null;
  };
}
