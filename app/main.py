"""Navigation and the header only: the pages, in order. A new page is one file in views/ and one line here."""

from __future__ import annotations

import streamlit as st
from streamlit.runtime.scriptrunner import StopException

from analysis.store import RunError
from app import figures, jobs, tour
from app.selection import header, publish, show_weights_note
from app.text import show_error

st.set_page_config(page_title="Routerscope", page_icon="app/static/favicon.png", layout="wide")

page = st.navigation(
    [
        st.Page("views/overview.py", title="Overview", default=True),
        st.Page("views/tokens.py", title="Tokens", url_path="tokens"),
        st.Page("views/load.py", title="Load", url_path="load"),
        st.Page("views/capacity.py", title="Capacity", url_path="capacity"),
        st.Page("views/specialization.py", title="Specialization", url_path="specialization"),
        st.Page("views/expert.py", title="Expert", url_path="expert"),
        st.Page("views/model.py", title="Model", url_path="model"),
        st.Page("views/runs.py", title="Runs", url_path="runs"),
        st.Page("views/glossary.py", title="Glossary", url_path="glossary"),
    ],
    position="top",
)
try:
    header()
except RunError as error:  # the folder of runs is none
    show_error(str(error))
    st.stop()
figures.begin()
try:
    if page.url_path not in ("runs", "glossary"):
        show_weights_note()
    tour.show(page.url_path)
    page.run()
except RunError as error:  # a file of the run that only this view needs is missing or damaged
    show_error(str(error))
except StopException:  # a page that has said all it can still gives its figures and stands in the URL
    figures.take_figures()
    publish(page.url_path)
    raise
figures.take_figures()
publish(page.url_path)
jobs.warm_up()
