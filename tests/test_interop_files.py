"""A run's files give the same answers in DuckDB, Polars and plain pyarrow as the product gives itself."""

import numpy as np
import pytest

from analysis.writing import RunWriter

from .bench.questions import ENGINES, QUERIES
from .bench.rivals import Run
from .bench.rivals_decisions import comparable
from .synthetic import card, site, zipf_parts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    layers, folder = tuple(site(i, 16, 4) for i in range(3)), tmp_path_factory.mktemp("runs") / "tiny"
    with RunWriter.open(folder, card(layers), {}) as writer:
        for part in zipf_parts(layers, 6_000, part_tokens=4_000):  # the second part's rows and documents do not start at 0
            writer.write(part)
        writer.commit()
    return Run(folder)


@pytest.mark.parametrize("query", QUERIES)
def test_every_engine_gives_the_same_answer(run: Run, query: str) -> None:
    answers = [comparable(ask(run)) for ask in QUERIES[query]]
    assert answers[0].any()
    for engine, answer in zip(ENGINES, answers, strict=True):
        assert np.array_equal(answer, answers[0]), f"{engine} answers {query!r} otherwise than the product"
