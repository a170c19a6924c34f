"""Runs: record your own text, watch it, open it; export and delete what is there."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pandas as pd
import streamlit as st

from analysis.export import MOST_ROWS, growing_rows
from analysis.store import RunError, RunSummary, delete_run, valid_run_name
from analysis.untrusted import Limits, Prompt, UploadError, paragraphs, read_prompts
from app import text
from app.downloads import downloads
from app.jobs import Job, QueueFull, session_id, worker
from app.runs_folder import DEMO, all_runs, allowed_models, runs_root
from app.selection import open_named

LIMITS = Limits()
LASTED = "From the begin of the capture to its end: the model's work, writing, counting, and the pauses of one that was interrupted; – in runs of earlier versions."
session = session_id()


def new_name(wanted: str) -> str:
    """A run name that is free: the one asked for, or one made of the time."""
    if wanted.strip():
        return valid_run_name(wanted.strip().lower())
    return datetime.now(UTC).strftime("run-%Y%m%d-%H%M%S")


def lasted(seconds: float | None) -> str:
    """Seconds, or hours:minutes:seconds of what took longer than a minute; a dash where the run does not say."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def start(model: str, pasted: str, split: bool, uploads: list, wanted: str) -> None:
    """Check everything that was given and queue the capture; one sentence where something is wrong."""
    if len(pasted.encode()) > LIMITS.bytes:
        raise UploadError(f"the pasted text has {len(pasted.encode()):,} bytes; at most {LIMITS.bytes:,} are taken at once")
    prompts = list(paragraphs(pasted)) if split else [Prompt(pasted, None, "pasted text")] if pasted.strip() else []
    for upload in uploads:
        try:
            prompts += read_prompts(upload.getvalue(), upload.name)
        except UploadError as error:
            raise UploadError(f"{upload.name[:80]}: {error}") from None
    if not prompts:
        raise UploadError("paste some text or choose a file first")
    name = new_name(wanted)
    if name in all_runs():
        raise RunError(f"there is a run {name} already: choose another name")
    worker().submit(Job(session, allowed_models()[model], prompts, runs_root() / name))


st.title("What does the router do with your own text?")
models = allowed_models()
st.text_area("Text to route", height=140, key="pasted", placeholder="Paste any text: prose, code, another language …")
split = st.checkbox("Each paragraph is a text of its own (an empty line lies between)", value="_tour" in st.session_state, key="paragraphs")
if split and st.session_state["pasted"]:
    try:
        text.show_note(f"{text.counted(len(paragraphs(st.session_state['pasted'])), 'paragraph')} pasted.")
    except UploadError as error:
        text.show_error(f"{str(error)[:1].upper()}{str(error)[1:]}.")
st.file_uploader(
    "or files: .txt (one prompt), .csv or .jsonl (one prompt per row: text, and label if you like)",
    type=["txt", "csv", "jsonl"], accept_multiple_files=True, max_upload_size=10, key="files",
)  # fmt: skip
options = st.columns(2)
options[0].selectbox("Model", list(models), key="model")
options[1].text_input("Name of the run (optional)", key="run_name", placeholder="a-z, 0-9, . _ -")


def state(run: RunSummary) -> str:
    """How a listed run is, and what to do where it is not complete."""
    if run.complete:
        return "complete"
    return "damaged: delete it" if run.model == "damaged" else "unfinished: repeat the command to resume, or delete it"


def record() -> None:
    """A click on Record. A callback runs whatever else reruns the page at that moment; a clicked button's value may be lost."""
    state = st.session_state
    try:
        start(state["model"], state["pasted"], state["paragraphs"], state["files"], state["run_name"])
        state.pop("_refused", None)
    except (UploadError, RunError, QueueFull) as error:
        state["_refused"] = f"Nothing was recorded: {error}."


st.button("Record", type="primary", key="record", on_click=record)
# A place of its own, there or not: else what is below moves by one, and headings vanish or double until the script has ended.
with st.container():
    if "_refused" in st.session_state:
        text.show_error(st.session_state["_refused"])


def watch() -> None:
    """The session's capture: its progress, then how it ended. The page runs anew once at the end, for the lists that show the run."""
    job = worker().of_session(session)
    if job is None:
        return
    if not job.over:
        st.session_state["_watched"] = job.id
        total = len(job.prompts)
        rate = f", {job.tokens / job.seconds:,.0f} tokens/s" if job.seconds else ""
        left = f", about {job.seconds / job.documents * (total - job.documents):.0f} s left" if job.documents else ""
        st.progress(
            job.documents / total,
            f"{job.state}: {job.documents} of {text.counted(total, 'prompt')}, {text.counted(job.tokens, 'token')}{rate}{left}",
        )
        if st.button("Cancel", key="cancel"):
            job.stop.set()
        return
    if st.session_state.pop("_watched", None) == job.id:
        st.rerun()
    if job.state == "done":
        st.success(f"Recorded in {job.seconds:.1f} s.")
        text.show_text(f"{text.counted(job.tokens, 'token')} of {text.counted(job.documents, 'prompt')}.")
        st.page_link("views/tokens.py", label="Open it on the Tokens page →", query_params={"run": job.out.name})
    elif job.state == "cancelled":
        st.info("The capture was cancelled and nothing of it is kept. What you gave is still above: press Record to start again.")
    else:
        text.show_error(job.message[:1].upper() + job.message[1:] + ".")
        st.caption("Nothing of it is kept. What you gave is still above: change it and press Record again.")


# Mounted whether or not a capture is under way: a browser's late question for a fragment that is gone would fill the log.
job = worker().of_session(session)
with st.container():
    st.fragment(watch, run_every=0.5 if job is not None and not job.over else None)()

st.header("Recorded runs")
runs = all_runs()
st.dataframe(
    pd.DataFrame(
        [
            {"run": r.name, "model": r.model, "tokens": r.n_tokens, "documents": r.n_documents, "MB": round(r.bytes / 1e6, 2),
             "recorded (UTC)": r.created[:16].replace("T", " "), "recorded in": lasted(r.seconds), "state": state(r)}
            for r in runs.values()
        ]
    ),
    hide_index=True,
    column_config={n: st.column_config.NumberColumn(format="localized") for n in ("tokens", "documents", "MB")}
    | {"recorded in": st.column_config.Column(help=LASTED)},
)  # fmt: skip
if not runs:
    st.info("Nothing recorded yet: paste some text above.")
    st.stop()
here = runs.get(st.session_state["_chosen"].get("run", ""))
text.show_heading(f"Take the numbers of {here.name}" if here is not None else "Take the numbers of a run")
if here is None:
    st.caption("No run is complete yet, so there is nothing to export.")
else:
    try:
        trace = open_named(here.folder, here.created)
        downloads(trace)
        rows = growing_rows(trace, "decisions")
        made = "Its file is made on the click; the browser shows nothing until then." if rows <= MOST_ROWS else ""
        text.show_note(
            f"The table of decisions has {rows:,} rows, one per token and layer. {made}",
            "For scale, on one core: 1,250,000 rows of eight experts each take 2 s as Parquet of 51 MB, 4 s as CSV of 271 MB and 33 s as JSON of"
            " 827 MB; the 291,696 rows of the demo run, two experts each, are 9, 35 and 115 MB.",
        )
    except RunError as error:
        text.show_error(str(error))
st.header("Delete a run")
own = [n for n in runs if n != DEMO]
if not own:
    st.caption("The demo run ships with the project and stays; there is no other.")
else:
    at_top = st.session_state["_chosen"].get("run", "")
    chosen = st.selectbox(
        "Run to delete",
        own,
        index=own.index(at_top) if at_top in own else 0 if len(own) == 1 else None,
        key=f"manage-{at_top}",
        placeholder="Choose a run",
    )
    if chosen is None:
        st.stop()
    text.show_text(f"{chosen}: {text.counted(runs[chosen].n_tokens, 'token')}, recorded {runs[chosen].created[:16].replace('T', ' ')} UTC.")
    sure = st.checkbox("Yes, delete this run and its text for good", key=f"sure-{chosen}")
    if st.button("Delete", key="delete", disabled=not sure):
        delete_run(runs_root(), chosen)
        st.rerun()
