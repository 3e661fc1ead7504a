// The call that repeats a result, for a terminal and for Python.

// Without @ and <, which begin the name of a local file in curl's -F.
const PLAIN = /^[\w.+%:/=-]+$/;
const NAME = "photo.jpg";

const shell = (text) => (PLAIN.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);
const python = JSON.stringify;

/** A file's name as text that is safe to paste: what could end a line or start an option is gone. */
export function safeName(name) {
  const plain = (name || NAME).replace(/[\p{C}/\\]+/gu, "_").replace(/^[-.]+/, "");
  return plain.slice(-100) || NAME;
}

const outName = (item) => `${item.task}.${item.result?.type.split("/")[1] ?? "png"}`;

export function curl(task, item) {
  const parts = [`curl ${shell(task.url)}`];
  if (task.needsKey) parts.push('-H "Authorization: Bearer $IMAGEN_KEY"');
  const file = (field, name) => {
    // curl reads ; and , in a file's name, unless it stands in quotes.
    const quoted = PLAIN.test(name) ? name : `"${name.replaceAll(/["\\]/g, "\\$&")}"`;
    parts.push(`-F ${shell(`${field}=@${quoted}`)}`);
  };
  if (task.picture) file(task.picture.name, safeName(item.name));
  for (const [name, value] of Object.entries(item.fields)) {
    if (value instanceof Blob) file(name, safeName(value.name));
    else if (PLAIN.test(value)) parts.push(`-F ${shell(`${name}=${value}`)}`);
    else parts.push(`--form-string ${shell(`${name}=${value}`)}`);
  }
  parts.push(`-o ${outName(item)}`);
  return parts.join(" \\\n  ");
}

export function pythonCall(task, item, root) {
  const literal = (name, value) => {
    if (value instanceof Blob) return `open(${python(safeName(value.name))}, "rb").read()`;
    const field = task.fields.find((one) => one.name === name);
    if (field?.type === "boolean") return value === "true" ? "True" : "False";
    return field?.isNumber && value !== "" && isFinite(value) ? value : python(value);
  };
  const given = [python(task.route.split("/").slice(4).join("/")), task.picture ? python(safeName(item.name)) : "None"];
  const named = Object.entries(item.fields).map(([name, value]) => `${name}=${literal(name, value)}`);
  const parts = [...given, ...named].map((part) => `        ${part},\n`).join("");
  return `${task.needsKey ? "# The key is read from $IMAGEN_KEY.\n" : ""}from imagen_client import Imagen

with Imagen(${python(root.href.replace(/\/$/, ""))}) as imagen:
    picture = imagen.run(\n${parts}    )
    picture.save(${python(outName(item))})`;
}
