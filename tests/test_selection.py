"""Choices and their place in the URL, where several callbacks answer one request."""

from streamlit.testing.v1 import AppTest


def script() -> None:
    import streamlit as st

    from app import selection

    def step() -> None:
        selection.acted()
        selection.set_choice("layer", "b")

    st.session_state["_chosen"] = {}
    selection._read_link()
    st.button("step", key="step", on_click=step)
    st.button("another act", key="act", on_click=selection.acted)
    st.text(selection.choice("layer", "Layer", {"a": "A", "b": "B"}, "a", width=160))
    st.session_state["_published"] = st.session_state["_chosen"]


def test_a_widget_that_lags_behind_a_step_does_not_undo_it() -> None:
    test = AppTest.from_function(script).run()
    test.button("step").click().run()
    assert test.text[0].value == "b"
    test.selectbox("layer").set_value("a")  # as the browser still has it when the next act follows at once
    test.button("act").click().run()
    assert not test.exception and test.text[0].value == "b"
    test.selectbox("layer").set_value("a").run()  # by hand
    assert test.text[0].value == "a"
