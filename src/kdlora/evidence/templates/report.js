"use strict";
// Comfort on top of a page that is whole without it: columns sort, and a point in a plot names its run.
(() => {
  const figureIn = (text) => {
    const found = text.replace(/\u2212/g, "-").replace(/[,\u202f\u00a0](?=\d{3})/g, "").match(/-?\d+(\.\d+)?/);
    return found ? Number(found[0]) : null;
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
  const namesItsRuns = (figure) => {
    const points = figure.querySelectorAll("svg a[aria-label]");
    if (!points.length) return;
    const said = document.createElement("p");
    said.className = "picked";
    said.setAttribute("role", "status");
    said.textContent = "Select a point to see which run it is.";
    figure.querySelector("svg:not(.swatch)").after(said);
    points.forEach((point) =>
      point.addEventListener("click", (event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        points.forEach((other) => other.classList.toggle("chosen", other === point));
        const record = document.createElement("a");
        record.href = point.getAttribute("href");
        record.textContent = record.getAttribute("href").startsWith("#") ? "table of runs" : "its record";
        said.replaceChildren(`${point.getAttribute("aria-label")} (`, record, ")");
      }),
    );
  };
  document.querySelectorAll("main table").forEach(sortable);
  document.querySelectorAll("main figure").forEach(namesItsRuns);
})();
