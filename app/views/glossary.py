"""Glossary: what does each number mean?"""

from __future__ import annotations

import streamlit as st

from analysis.glossary import GLOSSARY, glossary_table, search
from app import text
from app.downloads import table_downloads
from app.selection import typed

st.title("What does each number mean?")
asked = typed("term", "Search names, definitions and sources")
found = search(asked)
st.caption(
    f"{len(found):,} of {len(GLOSSARY):,} entries. E: experts of a site; k: experts per token; T: tokens; n_e: load of expert e. By chance: what a "
    "router that picks k different experts uniformly for every token would give."
)
if not found:
    text.show_text(f"Nothing here speaks of {asked}. Try one word of it, or empty the box to see every entry.")
for entry in found:
    text.show_heading(entry.title)
    text.show_text(f"{entry.definition[:1].upper()}{entry.definition[1:]}.")
    text.show_note(entry.facts)
st.header("Take the glossary")
table_downloads("routerscope-glossary", "one row per metric or term: definition, range, unit, chance, source", glossary_table())
