"""Write the request for a picture as code that draws it again: curl, plain Python, OpenAI's SDK."""

from __future__ import annotations

import json
import shlex

from fluxserve_gateway.page.gallery import Entry

_OF_OPENAI = ("model", "prompt", "size")


def curl(entry: Entry, url: str, *, keyed: bool) -> str:
    """Return a command line; `url` is the gateway's, and with `keyed` a key is read from the environment."""
    words = [f"curl -s {url}/v1/images/{_route(entry)}"]
    if keyed:
        words.append('-H "authorization: Bearer $FLUXSERVE_KEY"')
    if entry.edit:
        words += [
            "-F image=@input.png",
            *(f"-F {shlex.quote(f'{name}={value}')}" for name, value in entry.body.items()),
        ]
    else:
        words += ["-H 'content-type: application/json'", f"-d {shlex.quote(json.dumps(dict(entry.body)))}"]
    command = " \\\n  ".join(words)
    picture = """sed 's/.*"b64_json": "\\([^"]*\\)".*/\\1/'"""
    return f"{command} |\n  {picture} | base64 -d > picture.{entry.format}\n"


def python(entry: Entry, url: str, *, keyed: bool) -> str:
    """Return a program that needs `requests`."""
    key = '    headers={"authorization": "Bearer " + os.environ["FLUXSERVE_KEY"]},\n' if keyed else ""
    image = '    files={"image": open("input.png", "rb")},\n' if entry.edit else ""
    return (
        f"{_imports(keyed)}import requests\n\nanswer = requests.post(\n"
        f'    "{url}/v1/images/{_route(entry)}",\n{key}{image}'
        f"    {'data' if entry.edit else 'json'}={dict(entry.body)!r},\n)\nanswer.raise_for_status()\n"
        f'picture = answer.json()["data"][0]["b64_json"]\n{_save(entry)}'
    )


def openai_sdk(entry: Entry, url: str, *, keyed: bool) -> str:
    """Return a program that needs OpenAI's SDK."""
    key = 'os.environ["FLUXSERVE_KEY"]' if keyed else '"none"'
    image = '    image=open("input.png", "rb"),\n' if entry.edit else ""
    theirs = "".join(f"    {name}={entry.body[name]!r},\n" for name in _OF_OPENAI if name in entry.body)
    ours = {name: value for name, value in entry.body.items() if name not in _OF_OPENAI}
    return (
        f"{_imports(keyed)}from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{url}/v1", api_key={key})\n'
        f"answer = client.images.{'edit' if entry.edit else 'generate'}(\n{image}{theirs}    extra_body={ours!r},\n)\n"
        f"picture = answer.data[0].b64_json\n{_save(entry)}"
    )


def _imports(keyed: bool) -> str:
    return "import base64\n" + ("import os\n" if keyed else "") + "\n"


def _route(entry: Entry) -> str:
    return "edits" if entry.edit else "generations"


def _save(entry: Entry) -> str:
    return f'open("picture.{entry.format}", "wb").write(base64.b64decode(picture))\n'
