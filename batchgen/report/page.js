"use strict";
// The table of generations. Rows lie in the page as chunks of JSON, gzipped, in base64; a chunk is unpacked when it is
// shown or searched. Whatever a row says is put into the page as text, never as markup.
(() => {
  const packed = document.getElementById("rows-index");
  if (!packed) return;
  const PAGE = 50;
  const KEPT = 300e6; // characters of unpacked text that are kept for the next search
  const element = (id) => document.getElementById(id);
  const [search, filter, sort, direction, page] = ["search", "filter", "sort", "direction", "page"].map(element);
  const body = document.querySelector("#rows tbody");
  const chunks = [...document.querySelectorAll(".rows-chunk")];
  const unpacked = new Map();
  let kept = 0;
  let index;
  let order = []; // positions of all rows as they are sorted
  let matches = []; // those of them that are shown, page by page
  let descending = false;
  let at = 0; // the page
  let asked = 0; // grows with each question, so that an older answer is dropped
  let drawn = 0; // the same of what is shown
  let remark = ""; // behind the number of rows found
  let pattern = null;

  const count = (number) => number.toLocaleString("en");

  function bytesOf(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const letters = atob(text);
    const bytes = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
    return bytes;
  }

  async function unpack(script) {
    const stream = new Blob([bytesOf(script.textContent.trim())]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  // The texts of a chunk: for each row [prompt, characters cut, text, characters cut, columns, characters cut], and in
  // some rows a list of further parts, each [title, text, characters cut].
  async function textsOf(number) {
    let texts = unpacked.get(number);
    if (texts) return texts;
    texts = await unpack(chunks[number]);
    if (unpacked.has(number) || kept > KEPT) return texts; // none is let go: a search goes through all, in order
    for (const row of texts) kept += stringsOf(row).reduce((sum, text) => sum + text.length, 0);
    unpacked.set(number, texts);
    return texts;
  }

  const partsOf = (row) => row[6] || [];
  const stringsOf = (row) => [row[0], row[2], row[4], ...partsOf(row).map((part) => part[1])];

  async function rowOf(position) {
    const texts = await textsOf(Math.floor(position / index.chunk));
    return texts[position % index.chunk];
  }

  function sortRows() {
    const key = sort.value;
    const values = index[key];
    const sign = descending ? -1 : 1;
    order = index.row.map((_, position) => position);
    if (key === "id") {
      const compare = new Intl.Collator("en", { numeric: true }).compare;
      order.sort((one, other) => sign * compare(values[one], values[other]) || one - other);
    } else if (key !== "row" || descending) {
      order.sort((one, other) => sign * ((values[one] ?? -1) - (values[other] ?? -1)) || one - other);
    }
    for (const head of document.querySelectorAll("#rows th[data-sort]")) {
      if (head.dataset.sort !== key) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    }
    direction.textContent = descending ? "↓" : "↑";
    direction.setAttribute("aria-label", descending ? "descending; press for ascending" : "ascending; press for descending");
  }

  function passes(position) {
    const wanted = filter.value;
    if (wanted === "all") return true;
    if (wanted === "failed" || wanted === "good") return Boolean(index.failed[position]) === (wanted === "failed");
    return index.names[index.ending[position]] === wanted.slice(1);
  }

  // Shows the rows that pass the filter and hold the searched text. With many rows the first matches show at once.
  async function find() {
    const mine = ++asked;
    const text = search.value.trim();
    at = 0;
    if (!text) {
      pattern = null;
      matches = order.filter(passes);
      await show("");
      return;
    }
    pattern = new RegExp(text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"), "iu");
    const holds = new Uint8Array(index.row.length);
    let last = performance.now();
    let shown = false;
    for (let number = 0; number < chunks.length; number++) {
      const texts = await textsOf(number);
      if (mine !== asked) return;
      const first = number * index.chunk;
      texts.forEach((row, i) => {
        const position = first + i;
        if (!passes(position)) return;
        if (pattern.test(index.id[position]) || stringsOf(row).some((text) => pattern.test(text)) ||
            (index.failed[position] && pattern.test(index.names[index.ending[position]]))) holds[position] = 1;
      });
      if (performance.now() - last > (shown ? 400 : 120) && number + 1 < chunks.length) {
        matches = order.filter((position) => holds[position]);
        const share = Math.round((100 * (number + 1)) / chunks.length);
        await show(`, ${share} % searched`);
        if (mine !== asked) return;
        shown = true;
        await new Promise((done) => setTimeout(done));
        last = performance.now();
      }
    }
    matches = order.filter((position) => holds[position]);
    await show("");
  }

  // `text` as text, the searched words marked.
  function marked(text) {
    const piece = document.createDocumentFragment();
    let rest = text;
    for (let turn = 0; pattern && turn < 500; turn++) {
      const found = pattern.exec(rest);
      if (!found) break;
      piece.append(rest.slice(0, found.index));
      const mark = document.createElement("mark");
      mark.textContent = found[0];
      piece.append(mark);
      rest = rest.slice(found.index + found[0].length);
    }
    piece.append(rest);
    return piece;
  }

  function cell(text, name = "") {
    const made = document.createElement("td");
    made.className = name;
    made.append(marked(text));
    return made;
  }

  // What a line shows of a generation: its text, or the part that holds the searched words, or what there is instead.
  function generationOf(row) {
    const holds = (text) => pattern && pattern.test(text);
    const parts = partsOf(row);
    const found = !holds(row[2]) && parts.find(([, text]) => holds(text));
    const part = found || (!row[2] && (parts.find(([title]) => title === "tool calls") || parts[0]));
    return part ? `${part[0]}: ${glance(part[1])}` : glance(row[2]);
  }

  // The part of a long text that a line shows: its beginning, or what is around the searched words.
  function glance(text) {
    const found = pattern && pattern.exec(text);
    const from = found && found.index > 60 ? found.index - 30 : 0;
    return (from ? "… " : "") + text.slice(from, from + 160).replace(/\s+/g, " ");
  }

  function whole(position, row) {
    const line = document.createElement("tr");
    const box = document.createElement("div");
    box.className = "texts";
    const parts = [["prompt", row[0], row[1]], ...partsOf(row), ["columns", row[4], row[5]]];
    const thought = parts[1][0] === "thinking" ? 1 : 0; // by the first sample, before its text
    parts.splice(1 + thought, 0, [index.failed[position] ? "error" : "generation", row[2], row[3]]);
    for (const [name, text, cut] of parts) {
      if (!text && name !== "generation" && !name.startsWith("sample")) continue;
      const part = document.createElement("div");
      part.className = name.split(" ")[0];
      const title = document.createElement("h3");
      title.textContent = { columns: "other columns" }[name] || name;
      const content = document.createElement("pre");
      content.append(marked(text));
      part.append(title, content);
      if (cut) {
        const note = document.createElement("p");
        note.className = "soft";
        note.textContent = `… and ${count(cut)} more characters, which this page leaves out`;
        part.append(note);
      }
      box.append(part);
    }
    const made = document.createElement("td");
    made.className = "whole";
    made.colSpan = 8;
    made.append(box);
    line.append(made);
    return line;
  }

  function lineOf(position, row) {
    const line = document.createElement("tr");
    line.className = index.failed[position] ? "row failed" : "row";
    const number = document.createElement("td");
    number.className = "number";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = index.row[position];
    button.title = "show the whole row";
    button.setAttribute("aria-expanded", "false");
    number.append(button);
    const seconds = index.seconds[position];
    line.append(
      number,
      cell(index.id[position]),
      cell(index.names[index.ending[position]]),
      cell(count(index.prompt[position]), "number"),
      cell(count(index.generated[position]), "number"),
      cell(seconds === null ? "" : Number(seconds.toPrecision(3)).toString(), "number"),
      cell(glance(row[0])),
      cell(generationOf(row), index.failed[position] ? "error" : ""),
    );
    line.children[1].title = index.id[position];
    let opened = null;
    line.addEventListener("click", () => {
      if (getSelection().toString()) return;
      if (opened) opened.remove();
      opened = opened ? null : whole(position, row);
      if (opened) line.after(opened);
      button.setAttribute("aria-expanded", String(Boolean(opened)));
    });
    return line;
  }

  async function show(note) {
    const mine = ++drawn;
    const pages = Math.max(1, Math.ceil(matches.length / PAGE));
    at = Math.min(Math.max(at, 0), pages - 1);
    remark = note;
    const positions = matches.slice(at * PAGE, (at + 1) * PAGE);
    const lines = await Promise.all(positions.map(async (position) => lineOf(position, await rowOf(position))));
    if (mine !== drawn) return;
    body.replaceChildren(...lines);
    const of = index.row.length;
    element("found").textContent =
      matches.length === of ? `${count(of)} rows` : `${count(matches.length)} of ${count(of)} rows${note}`;
    element("pages").textContent = count(pages);
    page.value = at + 1;
    page.max = pages;
    element("previous").disabled = at === 0;
    element("next").disabled = at >= pages - 1;
  }

  function turn(to) {
    at = to;
    show(remark);
  }

  function resort() {
    sortRows();
    find();
  }

  async function begin() {
    index = await unpack(packed);
    const failed = index.failed.filter(Boolean).length;
    const choices = [["all", `all rows (${count(index.row.length)})`]];
    if (failed) choices.push(["good", `good rows (${count(index.row.length - failed)})`], ["failed", `failed rows (${count(failed)})`]);
    const numbers = index.names.map(() => 0);
    for (const ending of index.ending) numbers[ending]++;
    index.names.forEach((name, i) => choices.push([`=${name}`, `${name} (${count(numbers[i])})`]));
    for (const [value, text] of choices) filter.add(new Option(text, value));
    sortRows();
    await find();
    let waiting;
    search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(find, 150);
    });
    element("tools").addEventListener("submit", (event) => event.preventDefault());
    filter.addEventListener("change", find);
    sort.addEventListener("change", resort);
    direction.addEventListener("click", () => {
      descending = !descending;
      resort();
    });
    for (const head of document.querySelectorAll("#rows th[data-sort]")) {
      head.addEventListener("click", () => {
        descending = sort.value === head.dataset.sort ? !descending : head.dataset.sort !== "row" && head.dataset.sort !== "id";
        sort.value = head.dataset.sort;
        resort();
      });
    }
    element("previous").addEventListener("click", () => turn(at - 1));
    element("next").addEventListener("click", () => turn(at + 1));
    page.addEventListener("change", () => turn(Number(page.value) - 1 || 0));
  }

  begin().catch((error) => {
    element("found").textContent = `The rows cannot be unpacked: ${error.message}. A browser of 2023 or later can.`;
  });
})();
