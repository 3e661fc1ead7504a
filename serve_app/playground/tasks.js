// What the service can do, read from its OpenAPI document: tasks, their fields, and what each means.
// No name of a task or a field stands in this page.

import { words } from "./dom.js";

const HINTS = "x-imagen";

/** The tasks of a document, in its order. */
export function tasksOf(document, root) {
  const found = [];
  for (const [path, { post }] of Object.entries(document.paths)) {
    const schema = post?.requestBody?.content?.["multipart/form-data"]?.schema;
    // Forms of other protocols say nothing to this page.
    if (!Object.values(schema?.properties ?? {}).some((field) => HINTS in field)) continue;
    const required = schema.required ?? [];
    const fields = Object.entries(schema.properties).map(([name, raw]) => fieldOf(name, raw));
    const picture = fields.find((field) => field.isFile && required.includes(field.name));
    found.push({
      id: post.operationId,
      title: words(post.operationId),
      // Of several models, each stands in a line of its own.
      about: post.description?.replace(/^- [\w.-]+: (?=.*$)/, "") ?? "",
      summary: (post.summary ?? "").split(/\.(?:\s|$)/)[0],
      url: new URL(path.slice(1), root).href,
      route: path,
      picture,
      fields: inOrder(fields.filter((field) => field !== picture)),
      // A form that must say something begins with an example of it.
      examples: Object.fromEntries(fields.filter((field) => field.example && required.includes(field.name))
        .map((field) => [field.name, field.example])),
      hasJobs: (post.parameters ?? []).some((one) => one.name === "Prefer"),
      needsKey: Boolean(post.security?.length),
      formats: Object.keys(post.responses["200"].content).filter((type) => type.startsWith("image/")),
    });
  }
  return found;
}

/** What is written or slid comes first, as people change it most, unless it belongs to something else. */
const inOrder = (fields) => fields.toSorted((a, b) => isOften(b) - isOften(a));
const isOften = ({ group, needs, isLong, hasSlider }) =>
  group === "task" && Object.keys(needs).length === 0 && (isLong || hasSlider);

/** A help text with fields named as their labels are, without what stands beside each choice. */
function help(text, choices) {
  for (const [value, meaning] of Object.entries(choices)) text = text.replace(`${value}: ${meaning}.`, "");
  return text.trim().replace(/`(\w+)`|\b[a-z]+(_[a-z]+)+\b/g, (name, quoted) => words(quoted ?? name));
}

/** A field of a form. Values are text, as a form sends them, or files; some fields take both. */
function fieldOf(name, raw) {
  const { anyOf, ...shared } = raw;
  const isBinary = (one) => one.format === "binary";
  const text = anyOf?.find((one) => one.type !== "null" && !isBinary(one));
  const schema = { ...shared, ...text };
  const isFile = [raw, ...(anyOf ?? [])].some(isBinary);
  const hint = raw[HINTS] ?? {};
  const value = hint.default ?? schema.default;
  const choices = hint.choices ?? {};
  const isWhole = schema.type === "integer";
  const least = schema.minimum ?? schema.exclusiveMinimum;
  const span = schema.maximum - least;
  const step = isWhole ? 1 : span <= 2 ? 0.01 : 0.1;
  return {
    name,
    role: hint.role,
    example: schema.examples?.[0],
    group: hint.group ?? "task",
    needs: hint.needs ?? {},
    choices,
    help: help(schema.description ?? "", schema.enum ? choices : {}),
    type: schema.type,
    isFile,
    isOnlyFile: isFile && !text,
    fileWord: hint.file,
    isColor: schema.format === "color",
    options: schema.enum,
    isLong: schema.type === "string" && schema.maxLength >= 500,
    longest: schema.maxLength,
    value: value === undefined || value === null ? "" : String(value),
    isNumber: isWhole || schema.type === "number",
    hasSlider: span <= 1000 && hint.role !== "seed",
    step,
    min: schema.minimum ?? (schema.exclusiveMinimum === undefined ? undefined : least + step),
    max: schema.maximum,
  };
}

export const ofRole = (task, role) => task.fields.find((field) => field.role === role);

/** Whether a field means anything beside these values; `true` among its needs is any value. */
export function applies(task, field, values) {
  return Object.entries(field.needs).every(([name, wanted]) => {
    const other = task.fields.find((one) => one.name === name);
    const given = values[name] ?? other?.value ?? "";
    const value = given instanceof Blob ? other.fileWord : given;
    return wanted === true ? value !== "" : value === wanted;
  });
}

/** What differs from the defaults and means something: the fields to send. */
export function toSend(task, values) {
  const wanted = task.fields.filter((field) => {
    const value = values[field.name];
    return value !== undefined && value !== field.value && applies(task, field, values);
  });
  return Object.fromEntries(wanted.map((field) => [field.name, values[field.name]]));
}
