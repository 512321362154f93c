"use strict";
// Comfort on top of a page that is whole without it: columns sort.
(() => {
  const UNITS = { k: 1e3, M: 1e6, MB: 1e6, B: 1e9, GB: 1e9, s: 1e3, min: 6e4, h: 3.6e6 }; // of ms
  const FIGURE = /(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?:\s(k|MB?|G?B|s|min|h)\b)?/;
  const figureIn = (text) => {
    const found = text.replace(/\u2212/g, "-").replace(/[,\u202f\u00a0](?=\d{3})/g, "").match(FIGURE);
    return found ? Number(found[1]) * (UNITS[found[2]] ?? 1) : null;
  };
  const textOf = (row, column) => {
    const cell = row.cells[column].cloneNode(true);
    cell.querySelectorAll(".seeds").forEach((marks) => marks.remove());
    return cell.textContent.trim();
  };
  const compare = (column, numeric, direction) => (one, other) => {
    const [a, b] = [one, other].map((row) => textOf(row, column));
    if (!numeric) return direction * a.localeCompare(b, undefined, { numeric: true });
    const [x, y] = [figureIn(a), figureIn(b)];
    if (x === null || y === null) return (x === null) - (y === null); // what is not available stays below
    return direction * (x - y);
  };
  const sortable = (table) => {
    const body = table.tBodies[0];
    const original = [...body.rows];
    if (original.length < 2) return;
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      const numeric = header.classList.contains("number");
      const button = document.createElement("button");
      button.type = "button";
      button.title = "Sort by this column";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => {
        const first = numeric ? "descending" : "ascending";
        const next = { none: first, [first]: numeric ? "ascending" : "descending" }[header.ariaSort || "none"];
        headers.forEach((one) => one.removeAttribute("aria-sort"));
        if (next === undefined) return body.append(...original);
        header.ariaSort = next;
        body.append(...[...original].sort(compare(column, numeric, next === "ascending" ? 1 : -1)));
      });
    });
  };
  document.querySelectorAll("main table").forEach(sortable);
})();
