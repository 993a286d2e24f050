// Shared by the parts of the page: what is clicked, typed, dropped or pasted becomes an event that Python hears.
// Gradio gives `element` (this part), `trigger(event, data)` and `watch(property, callback)`.

const root = document.documentElement;

function point(row, column) {
  root.style.setProperty("--row", row);
  root.style.setProperty("--column", column);
}

function setLanguage(language) {
  root.lang = language;
  try { localStorage.setItem("vmamba-language", language); } catch { /* a browser that keeps nothing */ }
  trigger("select", { language });
}

function choosePatch(stack, row, column) {
  const { rows, columns } = stack.dataset;
  row = Math.min(Math.max(row, 0), rows - 1);
  column = Math.min(Math.max(column, 0), columns - 1);
  point(row, column);
  trigger("select", { row, column });
}

element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-send]");
  const stack = event.target.closest(".stack[data-rows]");
  if (event.target.closest("[data-theme]")) document.body.classList.toggle("dark");
  else if (button?.dataset.language) setLanguage(button.dataset.language);
  else if (button) trigger("select", { ...button.dataset });
  else if (stack) {
    const box = stack.getBoundingClientRect();
    const across = (event.clientX - box.left) / box.width, down = (event.clientY - box.top) / box.height;
    const part = (name) => Number(stack.style.getPropertyValue(name));
    choosePatch(stack, Math.floor(down / part("--down")), Math.floor(across / part("--across")));
  }
});

element.addEventListener("keydown", (event) => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  const stack = event.target.closest(".stack[data-rows]");
  if (!step || !stack) return;
  event.preventDefault();
  const [row, column] = ["--row", "--column"].map((name) => Number(root.style.getPropertyValue(name)));
  choosePatch(stack, row + step[0], column + step[1]);
});

element.addEventListener("input", (event) => {
  if (event.target.matches("[data-variable]")) root.style.setProperty(event.target.dataset.variable, event.target.value);
});

// --- A picture of one's own ------------------------------------------------------------------------------------------

function send(file) {
  const most = Number(element.querySelector("[data-most]")?.dataset.most);
  if (!file || !most) return;
  const { name, size } = file;
  if (size > most) { trigger("upload", { name, size }); return; }
  const reader = new FileReader();
  reader.onload = () => trigger("upload", { name, size, data: reader.result.split(",")[1] ?? "" });
  reader.readAsDataURL(file);
}

element.addEventListener("change", (event) => {
  if (event.target.type !== "file") return;
  send(event.target.files[0]);
  event.target.value = ""; // so that the same file can be chosen again
});
if (element.querySelector("[data-most]")) { // the whole page takes pictures, through this part
  const drop = () => element.querySelector(".drop").classList;
  document.addEventListener("dragover", (event) => { event.preventDefault(); drop().add("over"); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop().remove("over"); });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop().remove("over");
    send(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => send(event.clipboardData?.files[0]));
}

// --- What Python sends back ------------------------------------------------------------------------------------------

function arrive() {
  const told = element.querySelector("[data-at-row]");
  if (told) point(told.dataset.atRow, told.dataset.atColumn);
}
watch("value", arrive);
arrive();

if (element.querySelector("[data-language]")) {
  let chosen = null;
  try { chosen = localStorage.getItem("vmamba-language"); } catch { /* as above */ }
  const language = chosen ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
  root.lang = language;
  if (language !== "en") trigger("select", { language });
}
