// Tables that scroll can be reached and scrolled by keys. The theme puts a table into its box after the page has loaded.
const reach = () => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) {
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", `table: ${[...box.querySelectorAll("th")].map(head => head.textContent).join(", ")}`);
  }
};
new MutationObserver(reach).observe(document.body, {childList: true, subtree: true});
reach();
