// Where pictures come from: files, drop, paste, the camera, samples.

import { $, toast } from "./dom.js";
import { drawn } from "./store.js";

/** The type under which an item of the history is dragged. */
export const ITEM = "text/x-imagen-item";

/** Call `onFiles(files)` or `onSample(files)` with what comes in, `onItem(id)` with what is dragged back. */
export function listen(onFiles, onSample, onItem) {
  const [input, drop] = [$("files"), $("drop")];
  const give = ({ files }) => files.length && onFiles([...files]);
  input.addEventListener("change", () => {
    give(input);
    input.value = "";
  });
  document.addEventListener("paste", (event) => give(event.clipboardData));
  const isWelcome = ({ types }) => types.includes("Files") || types.includes(ITEM);
  document.addEventListener("dragenter", (event) => drop.classList.toggle("shown", isWelcome(event.dataTransfer)));
  drop.addEventListener("dragleave", () => drop.classList.remove("shown"));
  drop.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("shown");
    const id = event.dataTransfer.getData(ITEM);
    if (id) onItem(id);
    else give(event.dataTransfer);
  });
  $("camera-button").addEventListener("click", () => photograph(onFiles));
  for (const sample of $("samples").children) {
    sample.addEventListener("click", () => fetchSample(sample.querySelector("img").src, onSample));
  }
}

async function fetchSample(url, onSample) {
  try {
    const answer = await fetch(url);
    if (!answer.ok) throw new Error();
    onSample([new File([await answer.blob()], url.split("/").at(-1), { type: "image/jpeg" })]);
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
      const blob = await drawn(video, "image/jpeg");
      onFiles([new File([blob], "camera.jpg", { type: blob.type })]);
    }
    for (const track of stream.getTracks()) track.stop();
    video.srcObject = null;
  };
}
