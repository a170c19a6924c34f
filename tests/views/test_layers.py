"""Work on layers that takes seconds: told, left and gone on with."""

import pytest
import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from streamlit.testing.v1 import AppTest

from app import layers
from tests.synthetic import PLAIN


def test_one_layers_work_is_told_stopped_and_kept() -> None:
    def script() -> None:
        import pyarrow as pa
        import streamlit as st

        from app.layers import one_layer

        def make(tell: object) -> pa.Table:
            for done in (1, 2, 3):
                tell(done, 3)
                st.session_state["told"] = [*st.session_state.get("told", []), done]
                if len(st.session_state["told"]) == 1:
                    st.stop()  # as a person who leaves
            return pa.table({"site": [0]})

        known = st.session_state.setdefault("known", {})
        st.write(f"{one_layer(0, known, make).num_rows} row")

    test = AppTest.from_function(script).run()
    assert test.session_state["told"] == [1] and test.session_state["known"] == {} and not test.markdown
    test.run()
    assert test.session_state["told"] == [1, 1, 2, 3] and test.markdown[0].value == "1 row" and not test.exception
    test.run()
    assert test.session_state["told"] == [1, 1, 2, 3] and test.markdown[0].value == "1 row"


def test_work_is_told_of_every_so_often_and_as_what(monkeypatch: pytest.MonkeyPatch) -> None:
    def script() -> None:
        from app.layers import one_layer

        def make(tell: object) -> str:
            for done in range(1, 6):
                tell(done * 1_000, 5_000, **({"what": "the texts"} if done < 3 else {}))
            return "found"

        one_layer(0, {}, make)

    said, at = [], iter([0, 0.2, 0.2, 0.25, 0.31, 0.31, 0.35])
    monkeypatch.setattr(layers, "monotonic", lambda: next(at))
    monkeypatch.setattr(DeltaGenerator, "progress", lambda self, value, text: said.append((value, text)))
    assert not AppTest.from_function(script).run().exception
    assert said == [(0.2, "Reading the texts: 1,000 of 5,000 tokens …"), (0.6, "Reading the layer's decisions: 3,000 of 5,000 tokens …")]


def test_layers_done_are_kept_when_a_view_is_left() -> None:
    def script() -> None:
        import pyarrow as pa
        import streamlit as st

        from app.layers import kept, layer_by_layer
        from tests.synthetic import PLAIN, make_trace

        def make(sites: list[int]) -> object:
            st.session_state["asked"] = list(sites)
            for number in sites:
                if number and "left" not in st.session_state:
                    st.session_state["left"] = True
                    st.stop()
                yield number, pa.table({"site": [number]})

        st.session_state["told"] = layer_by_layer(make_trace(PLAIN), kept("a run", ("a test",)), make)["site"].to_pylist()

    st.cache_resource.clear()
    test = AppTest.from_function(script, default_timeout=180).run()
    assert "told" not in test.session_state and not test.exception
    test.run()
    assert test.session_state["asked"] == list(range(1, len(PLAIN))) and test.session_state["told"] == list(range(len(PLAIN)))
