"use strict";
// All clips have one clock: each screen is a canvas that shows the same step of its own sheet of frames.
(async () => {
  const stage = document.querySelector(".clips");
  if (!stage) return;
  const [steps, context, fps] = ["steps", "context", "fps"].map((name) => Number(stage.dataset[name]));
  const controls = stage.querySelector(".controls");
  const [button, slider, told] = ["button", "input", "output"].map((name) => controls.querySelector(name));
  await Promise.all([...stage.querySelectorAll(".screen img")].map((image) => image.decode()));

  const screens = [...stage.querySelectorAll("article")].flatMap((article) => {
    const truth = read(article.querySelector(".truth"));
    return [...article.querySelectorAll(".screen")].map((box) => build(box, read(box), truth));
  });
  const cursors = [...document.querySelectorAll(".chart")].map((chart) => {
    const { first, count, left, step } = chart.dataset;
    return { line: chart.querySelector(".cursor"), first: +first, count: +count, left: +left, step: +step };
  });

  function read(box) {
    const image = box.querySelector("img");
    const { frames, columns, rows } = box.dataset;
    return { image, frames: +frames, columns: +columns, width: image.naturalWidth / columns, height: image.naturalHeight / rows };
  }

  // What a model was given is what really happened; an error begins with the first prediction.
  function build(box, own, truth) {
    const canvas = document.createElement("canvas");
    canvas.width = own.width;
    canvas.height = own.height;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", own.image.alt);
    own.image.hidden = true;
    own.image.style.display = "none";
    box.append(canvas);
    const before = box.classList.contains("error") ? null : truth;
    return { pen: canvas.getContext("2d"), own, before, delay: steps - own.frames };
  }

  function draw({ pen, own, before, delay }, step) {
    const sheet = step < delay ? before : own;
    const at = step < delay ? step : step - delay;
    pen.clearRect(0, 0, own.width, own.height);
    if (!sheet) return;
    const [x, y] = [(at % sheet.columns) * own.width, Math.floor(at / sheet.columns) * own.height];
    pen.drawImage(sheet.image, x, y, own.width, own.height, 0, 0, own.width, own.height);
  }

  let step = 0, timer = 0;
  function show(next) {
    step = next;
    const split = context > 0 && context < steps;
    const state = split ? (step < context ? ", given" : ", predicted") : "";
    const words = `frame ${step + 1} of ${steps}${state}`;
    screens.forEach((screen) => draw(screen, step));
    stage.classList.toggle("predicted", step >= context || context === steps);
    slider.value = step;
    slider.setAttribute("aria-valuetext", words);
    told.value = words;
    for (const { line, first, count, left, step: wide } of cursors) {
      const at = step + 1 - first;
      line.style.visibility = at >= 0 && at < count ? "visible" : "hidden";
      line.setAttribute("transform", `translate(${left + at * wide} 0)`);
    }
  }

  function play(on) {
    clearInterval(timer);
    timer = 0;
    button.textContent = on ? "Pause" : "Play";
    let held = 0; // the last frame stays for a moment before the loop begins again
    if (on) timer = setInterval(() => {
      if (step === steps - 1 && held++ < fps / 2) return;
      held = 0;
      show((step + 1) % steps);
    }, 1000 / fps);
  }

  button.addEventListener("click", () => play(!timer));
  slider.addEventListener("input", () => { play(false); show(Number(slider.value)); });
  controls.hidden = false;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  show(still ? Math.min(context, steps - 1) : 0);
  play(!still);
})();
