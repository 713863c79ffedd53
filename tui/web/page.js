// The terminal takes the keys from the start, and never loses them to a click on the page's edge.
const focus = () => document.querySelector("#terminal textarea")?.focus();
window.addEventListener("load", focus);
window.addEventListener("focus", focus);
