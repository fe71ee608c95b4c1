"""The parts of the page that Gradio has no component for: input images, and pictures with buttons."""

from __future__ import annotations

import gradio as gr

_IMAGES = """<div class="images"><label>${label}
<input type="file" accept="image/png,image/jpeg,image/webp" ${most > 1 ? "multiple" : ""}></label>
<ul>${(value || []).map(name => `<li><img src="pictures/${name}" alt="An input image">` +
`<button type="button" data-name="${name}" aria-label="Remove this image">×</button></li>`).join("")}</ul>
<p class="refusal" role="alert">${problem}</p></div>"""

# An upload is answered with the name that the picture has from then on.
_UPLOAD = """
element.addEventListener('change', async event => {
  const files = [...event.target.files], names = [];
  let problem = '';
  for (const file of files) {
    const answer = await fetch('uploads', {method: 'POST', body: file});
    const said = await answer.json();
    if (answer.ok) names.push(said.name); else problem = said.error.message;
  }
  const most = props.most, kept = most > 1 ? (props.value || []) : [];
  if (kept.length + names.length > most) problem = `allowed: at most ${most} images`;
  event.target.value = '';  // the same file may be chosen again
  props.problem = problem.replace(/[&<>]/g, '');
  props.value = [...kept, ...names].slice(0, most);
});
element.addEventListener('click', event => {
  const button = event.target.closest('[data-name]');
  if (!button) return;
  props.problem = '';
  props.value = props.value.filter(name => name !== button.dataset.name);
});
"""

_CHOOSE = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-name]');
  if (button) trigger('click', {name: button.dataset.name});
});
"""


def input_images(label: str, most: int) -> gr.HTML:
    """Make a field for images, whose value is a list of their names on the shelf."""
    return gr.HTML([], html_template=_IMAGES, js_on_load=_UPLOAD, label=label, most=most, problem="", elem_id="images")


def chooser(name: str, content: str = "") -> gr.HTML:
    """Make a place for HTML whose buttons have names; its event `click` carries the `name` of one."""
    return gr.HTML(content, js_on_load=_CHOOSE, elem_id=name)
