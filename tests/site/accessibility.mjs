// Runs axe on every page of the built site: light and dark, 1280 and 420 pixels wide.
//
// Usage: node accessibility.mjs SITE CHROMIUM [PAGE ...]. Exits with 1 if there is a violation of
// WCAG 2.1, levels A and AA. Pages that Sphinx makes of source code are left out.

import { readdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, relative, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const [site, executablePath, ...wanted] = process.argv.slice(2);
const root = resolve(site);
const pages = readdirSync(root, { recursive: true })
  .filter((name) => name.endsWith(".html") && !name.startsWith("_"))
  .filter((name) => !wanted.length || wanted.includes(name.slice(0, -".html".length)))
  .sort();
const ways = [];
for (const colorScheme of ["light", "dark"])
  for (const width of [1280, 420]) ways.push({ colorScheme, width });

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const found = new Map(); // per rule: what it asks for, and where it is broken
let checks = 0;
for (const { colorScheme, width } of ways) {
  const context = await browser.newContext({ colorScheme, viewport: { width, height: 900 } });
  const page = await context.newPage();
  for (const name of pages) {
    await page.goto(pathToFileURL(join(root, name)).href);
    await page.evaluate(axe);
    const result = await page.evaluate(() =>
      axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"] }),
    );
    checks += result.passes.length + result.violations.length;
    for (const { id, help, nodes } of result.violations) {
      const entry = found.get(id) ?? { help, places: [] };
      for (const node of nodes)
        entry.places.push(`${name}, ${colorScheme}, ${width}: ${node.html.slice(0, 160)}`);
      found.set(id, entry);
    }
  }
  await context.close();
}
await browser.close();

for (const [id, { help, places }] of found) {
  console.log(`${id}: ${help} (${places.length} places)`);
  for (const place of places.slice(0, 8)) console.log(`    ${place}`);
}
const total = [...found.values()].reduce((sum, entry) => sum + entry.places.length, 0);
console.log(
  `accessibility: ${pages.length} pages, ${ways.length} ways each, ${checks} checks, ` +
    `${total} violations of ${found.size} rules`,
);
process.exit(pages.length && !total ? 0 : 1);
