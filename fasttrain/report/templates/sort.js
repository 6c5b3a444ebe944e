// Pressing a heading sorts its table's rows by data-value or text, the largest first; then the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
    const order = heading.ariaSort === "descending" ? "ascending" : "descending";
    for (const other of headings) other.ariaSort = "none";
    heading.ariaSort = order;
    const rows = [...table.tBodies[0].rows].sort((one, other) => {
      const [a, b] = [one.cells[column], other.cells[column]];
      return "value" in a.dataset ? a.dataset.value - b.dataset.value : a.textContent.localeCompare(b.textContent);
    });
    table.tBodies[0].append(...(order === "ascending" ? rows : rows.reverse()));
  }));
}
