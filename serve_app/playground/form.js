// The form of a task, built from its fields.

import { el, words } from "./dom.js";
import { applies } from "./tasks.js";

const GROUPS = { task: "", file: "The file", job: "The job" };
const SHOWN_BESIDE_RUN = new Set(["count", "preview"]);

/**
 * A task's settings as a fieldset.
 *
 * `values` has what differs from the defaults, by name; it is changed in place. `open` says whether
 * the fieldset starts unfolded.
 */
export function settings(task, values, open, onChange) {
  const updates = [];
  const set = (field, value) => {
    if (value === field.value || value === undefined) delete values[field.name];
    else values[field.name] = value;
    refresh();
    onChange();
  };
  const refresh = () => {
    for (const update of updates) update();
    reset.hidden = Object.keys(values).length === 0;
  };
  const reset = el("button", {
    type: "button", className: "quiet", textContent: "Reset", ariaLabel: `Reset ${task.title}`,
    onclick: () => {
      for (const name of Object.keys(values)) delete values[name];
      refresh();
      onChange();
    },
  });
  const make = (field) => {
    const [node, show] = control(task, field, (value) => set(field, value));
    updates.push(() => {
      node.hidden = !applies(task, field, values);
      show(values[field.name] ?? field.value);
    });
    return node;
  };
  const hasChoice = (field) => field.options?.length !== 1;
  const shown = task.fields.filter((field) => !SHOWN_BESIDE_RUN.has(field.role) && hasChoice(field));
  const groups = Object.groupBy(shown, (field) => field.group);
  const others = Object.keys(groups).filter((group) => group !== "task");
  const body = [
    ...(groups.task ?? []).map(make),
    ...others.map((group) =>
      el("details", { className: "group" },
        el("summary", { textContent: GROUPS[group] || words(group) }),
        groups[group].map(make))),
  ];
  const heading = el("summary", {}, el("span", { textContent: `${task.title} settings` }));
  const node = el("details", { className: "settings", open },
    heading, el("div", { className: "settings-body" }, reset, body));
  refresh();
  return node;
}

/** A labelled control, and a function that shows a value in it. */
function control(task, field, set) {
  const id = `field-${task.id}-${field.name}`;
  const describedBy = `${id}-help`;
  const common = { id, "aria-describedby": describedBy };
  const help = el("small", { id: describedBy, textContent: field.help });
  const label = el("label", { htmlFor: id, textContent: words(field.name) });
  const wrap = (kind, ...parts) => el("div", { className: `field ${kind}` }, ...parts);
  if (field.isFile) return fileControl(field, common, label, help, wrap, set);
  if (field.options) return choiceControl(field, id, help, set);
  if (field.type === "boolean") {
    const box = el("input", { ...common, type: "checkbox", onchange: () => set(String(box.checked)) });
    return [wrap("switch", box, label, help), (value) => (box.checked = value === "true")];
  }
  if (field.isNumber) return numberControl(field, common, label, help, wrap, set);
  if (field.isColor) {
    const swatch = el("input", {
      type: "color", ariaLabel: `${words(field.name)}, picker`, oninput: () => set(swatch.value),
    });
    const text = el("input", { ...common, type: "text", placeholder: "None", oninput: () => set(text.value) });
    const show = (value) => {
      if (document.activeElement !== text) text.value = value;
      if (/^#[0-9a-f]{6}$/i.test(value)) swatch.value = value;
    };
    return [wrap("color", label, swatch, text, help), show];
  }
  const input = el(field.isLong ? "textarea" : "input", {
    ...common, maxLength: field.longest, rows: 2, oninput: () => set(input.value),
  });
  return [wrap("text", label, input, help), (value) => (input.value === value || (input.value = value))];
}

function numberControl(field, common, label, help, wrap, set) {
  const { min, max, step } = field;
  // A default such as 0 may stand for something else, as "by height": no number is shown for it.
  const meaning = field.choices[field.value];
  const text = (value) => (meaning && value === field.value ? "" : value);
  // A seed may be larger than a JavaScript number is exact, so that it stays text.
  const kind = field.hasSlider ? { type: "number", min, max, step: "any" } : { inputMode: "numeric" };
  const input = el("input", { ...common, ...kind,
    oninput: () => set(input.value === "" && meaning ? field.value : input.value) });
  input.placeholder = meaning ? words(meaning) : field.value || (field.role ? "random" : "");
  if (!field.hasSlider) {
    return [wrap("text", label, input, help),
      (value) => (input.value === text(value) || (input.value = text(value)))];
  }
  const slider = el("input", {
    type: "range", min, max, step, ariaLabel: `${words(field.name)}, slider`,
    oninput: () => set(slider.value),
  });
  const show = (value) => {
    if (document.activeElement !== input) input.value = text(value);
    slider.value = value;
    slider.style.setProperty("--filled", `${((slider.value - min) / (max - min)) * 100}%`);
  };
  return [wrap("number", label, input, slider, help), show];
}

function choiceControl(field, id, help, set) {
  const explained = Object.keys(field.choices).length > 0;
  const any = field.value === "" ? [""] : [];
  const radios = [...any, ...field.options].map((option) => {
    const radio = el("input", {
      type: "radio", name: id, value: option, onchange: () => radio.checked && set(option),
    });
    const meaning = field.choices[option];
    return el("label", {}, radio, el("span", {}, el("b", { textContent: option ? words(option) : "Any" }),
      meaning ? el("small", { textContent: words(meaning) }) : null));
  });
  if (explained) help.classList.add("sr-only");
  const legend = el("legend", { textContent: words(field.name) });
  const list = el("div", { className: explained ? "choices" : "segments" }, radios);
  const node = el("fieldset", { className: "field choice" }, legend, list, help);
  const show = (value) => {
    for (const radio of node.querySelectorAll("input")) radio.checked = radio.value === value;
  };
  return [node, show];
}

function fileControl(field, common, label, help, wrap, set) {
  const input = el("input", { ...common, type: "file", accept: "image/*",
    onchange: () => set(input.files[0]) });
  return [wrap("text", label, input, help), (value) => value || (input.value = "")];
}

/** The list of tasks: a click chooses one, its box adds it to the others. */
export function taskList(tasks, chosen, states, onChange) {
  return tasks.map((task) => {
    const isChosen = chosen.has(task.id);
    const state = states[task.id];
    const choose = el("button", {
      type: "button", className: "task-name", ariaPressed: String(isChosen),
      onclick: () => onChange(new Set([task.id]), task.id),
    }, el("b", { textContent: task.title }), el("small", { textContent: task.summary, title: task.summary }),
    state && !["ready", "idle"].includes(state.text)
      ? el("em", { className: state.kind, textContent: state.text }) : null);
    const box = el("input", {
      type: "checkbox", checked: isChosen, ariaLabel: `Also run ${task.title}`,
      title: "Run it beside the others",
      onchange: () => {
        const others = new Set(chosen);
        if (box.checked) others.add(task.id);
        else others.delete(task.id);
        onChange(others.size ? others : new Set([task.id]), task.id, true);
      },
    });
    return el("li", { className: isChosen ? "chosen" : "" }, choose, box);
  });
}
