// A link to a folded solution opens it.
function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const box = target?.closest(".admonition.toggle-hidden, .admonition:has(.toggle-hidden)");
  box?.querySelector("button.toggle-button")?.click();
  if (box) target.scrollIntoView();
}
addEventListener("hashchange", openTarget);
addEventListener("load", openTarget);
