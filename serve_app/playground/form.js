// The form of a task, built from its fields.

import { el, words } from "./dom.js";
import { applies } from "./tasks.js";

const GROUPS = { file: "The file", job: "The job" };
const BESIDE_RUN = ["count", "preview"]; // roles of fields that have their place elsewhere

/**
 * A task's settings: { node, refresh }; `refresh` shows what `values` has.
 *
 * `values` has what differs from the defaults, by name; it is changed in place.
 */
export function settings(task, values) {
  const refresh = () => {
    for (const { field, node, show } of controls) {
      node.hidden = !applies(task, field, values);
      show(values[field.name] ?? field.value);
    }
    reset.hidden = Object.keys(values).length === 0;
  };
  const set = (field, value) => {
    if (value === field.value || value === undefined) delete values[field.name];
    else values[field.name] = value;
    refresh();
  };
  const reset = el("button", {
    className: "quiet", textContent: "Reset", ariaLabel: `Reset ${task.title}`,
    onclick: () => { for (const field of task.fields) set(field); },
  });
  const hasChoice = (field) => field.isFile || field.options?.length !== 1;
  const shown = task.fields.filter((field) => !BESIDE_RUN.includes(field.role) && hasChoice(field));
  const controls = shown.map((field) => control(task, field, (value) => set(field, value)));
  const { task: own = [], ...others } = Object.groupBy(controls, ({ field }) => field.group);
  const groups = Object.entries(others).map(([group, inside]) => el("details", { className: "group" },
    el("summary", { textContent: GROUPS[group] ?? words(group) }), inside.map(({ node }) => node)));
  const node = el("details", { className: "settings" },
    el("summary", { textContent: `${task.title} settings` }),
    el("div", { className: "settings-body" },
      reset, el("small", { textContent: task.about }), own.map((one) => one.node), groups));
  refresh();
  return { node, refresh };
}

/** A labelled control for a field, and a function that shows a value in it. */
function control(task, field, set) {
  const title = words(field.name);
  const id = `field-${task.id}-${field.name}`;
  const help = el("small", { id: `${id}-help`, textContent: field.help });
  const props = { id, "aria-describedby": help.id };
  const make = field.options ? choice : field.type === "boolean" ? flag : field.isOnlyFile ? null : written;
  const { kind = "text", parts = [], show } = make?.(field, props, set, title) ?? {};
  const file = field.isFile && el("input", { ...(make ? { ariaLabel: `${title}, file` } : props),
    type: "file", accept: "image/*", onchange: () => set(file.files[0]) });
  const label = field.options ? el("legend", { textContent: title }) : el("label", { htmlFor: id, textContent: title });
  const node = el(field.options ? "fieldset" : "div", { className: `field ${kind}` },
    label, field.options && help, parts, file, !field.options && help);
  return { field, node, show: (value) => {
    const data = new DataTransfer();
    if (value instanceof File) data.items.add(value);
    if (file) file.files = data.files;
    show?.(value instanceof Blob ? null : value);
  } };
}

function flag(field, props, set) {
  const box = el("input", { ...props, type: "checkbox", onchange: () => set(String(box.checked)) });
  return { kind: "switch", parts: [box], show: (value) => (box.checked = value === "true") };
}

/** A text or a number, with a slider or a colour picker beside it. */
function written(field, props, set, title) {
  const { min, max, step } = field;
  // A default such as 0 may stand for something else, as "by height": no number is shown for it.
  const meaning = field.choices[field.value];
  const unset = { seed: "Random" }[field.role] ?? (field.isColor ? "None" : field.hasSlider ? "Unset" : "");
  const placeholder = meaning ? words(meaning) : (field.isNumber && field.value) || unset;
  // A seed may be larger than a JavaScript number is exact, so that it stays text.
  const bounds = field.hasSlider ? { type: "number", min, max, step: "any" }
    : field.isNumber ? { inputMode: "numeric" } : { maxLength: field.longest, rows: 2 };
  const input = el(field.isLong ? "textarea" : "input", { ...props, ...bounds, placeholder,
    oninput: () => set(input.value === "" && meaning ? field.value : input.value) });
  const slider = field.hasSlider && el("input", { type: "range", min, max, step,
    ariaLabel: `${title}, slider`, oninput: () => set(slider.value) });
  const swatch = field.isColor && el("input", { type: "color", ariaLabel: `${title}, picker`,
    oninput: () => set(swatch.value) });
  const show = (value) => {
    const text = value === null || (meaning && value === field.value) ? "" : value;
    if (input.value !== text) input.value = text;
    if (swatch && /^#[0-9a-f]{6}$/i.test(text)) swatch.value = text;
    if (!slider) return;
    slider.value = text;
    slider.ariaValueText = text || placeholder;
  };
  const kind = slider ? "number" : swatch ? "color" : "text";
  return { kind, parts: [swatch, input, slider], show };
}

function choice(field, { id }, set) {
  const values = field.value === "" ? ["", ...field.options] : field.options;
  const radios = values.map((value) =>
    el("input", { type: "radio", name: id, value, onchange: () => set(value) }));
  const labels = radios.map((radio) => {
    const title = words(radio.value) || (field.isFile ? "None" : "Any");
    const meaning = field.choices[radio.value];
    return el("label", {}, radio, el("span", {}, el("span", { textContent: title }),
      meaning && el("small", { textContent: words(meaning) })));
  });
  const list = el("div", { className: Object.keys(field.choices).length ? "choices" : "segments" }, labels);
  const show = (value) => radios.forEach((radio) => (radio.checked = radio.value === value));
  return { kind: "choice", parts: [list], show };
}

/** The list of tasks: a click chooses one, its box adds it to the others. */
export function taskList(tasks, chosen, states, onChange) {
  return tasks.map((task) => {
    const isChosen = chosen.has(task.id);
    const state = states[task.id];
    const choose = el("button", {
      className: "task-name", ariaPressed: String(isChosen),
      onclick: () => onChange(new Set([task.id])),
    }, el("b", { textContent: task.title }), el("small", { textContent: task.summary, title: task.summary }),
    state && !["ready", "idle"].includes(state) && el("em", { className: state, textContent: state }));
    const box = el("input", {
      type: "checkbox", checked: isChosen, ariaLabel: `Also run ${task.title}`,
      title: "Run it beside the others",
      onchange: () => {
        const next = chosen.symmetricDifference(new Set([task.id]));
        onChange(next.size ? next : new Set([task.id]));
      },
    });
    return el("li", { className: isChosen ? "chosen" : "" }, choose, box);
  });
}
