"""What every number and every word on the pages means: the metrics of METRICS, and the field's terms. One entry adds one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

import pyarrow as pa

from .metrics import METRICS, Metric


@dataclass(frozen=True)
class Entry:
    """A word and its meaning. ``range``, ``unit`` and ``chance`` are empty for a term that is not one number per layer."""

    name: str
    title: str
    definition: str
    source: str
    range: str = ""
    unit: str = ""
    chance: str = ""

    @property
    def facts(self) -> str:
        """Name, range, chance and source in one line; of a term the source alone."""
        unit = f" ({self.unit})" if self.unit != "1" else ""
        number = f"{self.name}: from {self.range}{unit}. By chance: {self.chance}. " if self.range else ""
        return f"{number}Source: {self.source}."


TERMS = (
    Entry("site", "Site", "one routed block of the model, in execution order; where every model layer holds at most one, a site is called by its"
          " layer. Experts of different sites are unrelated, whatever their numbers", "Routerscope; JetMoE has two sites per layer"),
    Entry("expert", "Expert", "one of the E parallel networks of a site, usually a feed-forward block; a token visits only those chosen for it",
          "Shazeer et al. 2017, arXiv 1701.06538"),
    Entry("router", "Router", "the small network that scores every expert for each token; also called gate", "Shazeer et al. 2017, arXiv 1701.06538"),
    Entry("router_logits", "Router logits", "the router's raw scores of a token, one per expert, before softmax or sigmoid. The experts with the"
          " largest logits need not be those executed: groups, bias correction or hashing may choose others", "Switch Transformers, arXiv 2101.03961"),
    Entry("top_k", "Top-k", "k is the number of experts a token is sent to at a site; each of the k choices is one assignment",
          "Shazeer et al. 2017, arXiv 1701.06538"),
    Entry("gate_weight", "Gate weight", "the factor by which an expert's output is multiplied before the outputs of a token's experts are summed;"
          " recorded as executed, or rounded where the run's pages say so. Whether the k weights sum to 1 depends on the model", "Shazeer et al. 2017, arXiv 1701.06538"),
    Entry("shared_expert", "Shared expert", "an expert that every token passes, beside the routed ones; it has no router score and is in no load",
          "DeepSeekMoE, arXiv 2401.06066"),
    Entry("expert_load", "Expert load", "n_e: the number of assignments an expert received at one site; all loads of a site sum to T k less what"
          " was dropped. Padding is never counted", "GShard, arXiv 2006.16668"),
    Entry("even_share", "Even share", "the mean load of a site, T k / E; a load of 2x is twice that", "GShard, arXiv 2006.16668"),
    Entry("expert_capacity", "Expert capacity", "C: the most assignments an expert processes per batch, the even share times the capacity factor,"
          " rounded up; frameworks differ in k, rounding and minimum, and the Capacity page offers each", "Switch Transformers, arXiv 2101.03961, eq. 3"),
    Entry("capacity_factor", "Capacity factor", "CF: expert capacity over the even share; at 1 an expert has room for exactly its even share,"
          " larger factors drop less and leave more slots idle", "Switch Transformers, arXiv 2101.03961"),
    Entry("overflow", "Overflow", "assignments beyond an expert's capacity: sum over experts of max(n_e - C, 0), whatever the drop policy",
          "GShard, arXiv 2006.16668"),
    Entry("dropped_token", "Dropped token", "a token with an assignment that overflowed and was not processed; fully dropped if all k were. It"
          " goes on through the residual connection alone", "Switch Transformers, arXiv 2101.03961"),
    Entry("idle_slot", "Idle slot", "room of an expert that no assignment filled, max(C - n_e, 0); computed as padding all the same",
          "Switch Transformers, arXiv 2101.03961"),
    Entry("co_activation", "Co-activation", "of the tokens that chose expert i, the share that also chose expert j at the same site, N_ij / N_i;"
          " uniform routing gives (k - 1) / (E - 1)", "OLMoE, arXiv 2409.02060, eq. 6"),
    Entry("flow", "Flow", "how many tokens go from expert i at one site to expert j at the next, beside what the two loads alone would give",
          "Routerscope; metrics of pairs"),
    Entry("repetition", "Repetition", "of neighbouring tokens of one document, the share with the same first choice, or with any expert in common; uniform routing"
          " gives 1 / E and 1 - C(E - k, k) / C(E, k), and the document's tokens in an order dealt at random what its subject alone gives",
          "Mixtral of Experts, arXiv 2401.04088, Table 5"),
    Entry("predicted_next_token", "Predicted next token", "the id of the largest logit the model gives after a token, whatever token follows in the text;"
          " recorded with every token of a language model, but for the prompt of a generation before its last token", "OLMoE, arXiv 2409.02060, eq. 8"),
    Entry("vocabulary_specialization", "Vocabulary specialization", "mean over token ids of the largest share any expert has of the id's tokens, the"
          " id being the token read, the next or the predicted next; ids seen once score 1 whatever the router does, so that ids seen at least 10 times"
          " are shown beside the same assignments dealt again to the tokens", "OLMoE, arXiv 2409.02060, eq. 8"),
    Entry("router_saturation", "Router saturation", "of the k experts a token is sent to in one run, the share it is also sent to in another over the same"
          " tokens, mean over tokens; uniform routing gives k / E, turning the tokens of each document keeps what their texts share",
          "OLMoE, arXiv 2409.02060, eq. 5"),
    Entry("leaning_documents", "Leaning documents", "of the documents that hold a token, those in which it uses the expert more often than the document's"
          " tokens do; by chance about half or fewer, more at an expert that most tokens use. Tested by document: each gives the share of the token's"
          " occurrences there that use the expert, expected to be the document's own rate", "Routerscope; Hoeffding 1963"),
    Entry("document_balance", "Document balance", "max / mean of the loads of one document's tokens at a site, beside what uniform routing of so few"
          " tokens stays below", "arXiv 2408.15664, its batch being a document"),
    Entry("device_queue", "Longest device queue", "load of the busiest of D devices over their mean load, in one batch at one site, experts placed in"
          " order of their number, E / D on each; 1 to D, its inverse is balancedness over devices; uniform routing of few tokens alone makes it longer",
          "EPLB, whose balancedness is mean / max"),
    Entry("weight_similarity", "Weight similarity", "cosine of two experts' weight matrices, each expert flattened to one vector of n numbers; independent"
          " random weights give 0 with standard deviation 1 / sqrt n. Neurons may stand in any order, so it says little of function", "common"),
    Entry("lift", "Lift", "share of a group's tokens that use an expert, over the expert's share of all tokens; 1 is no preference",
          "association rules, Brin et al. 1997"),
    Entry("log2_enrichment", "log2 enrichment", "log2 of the share of a group's tokens that use an expert over the share of all other tokens; 0 is"
          " no preference, 1 is twice as often", "common in genomics"),
    Entry("log2_enrichment_within", "log2 enrichment within documents", "the same comparison made inside each document and summed up, so that documents that"
          " differ in their kinds and in their experts make no preference: log2 of uses by tokens of the kind, each document weighted by the share"
          " of its other tokens, over uses by these, weighted by the kind's share; 0 is no preference", "Mantel and Haenszel 1959; Greenland and Robins 1985"),
    Entry("false_discovery_rate", "False discovery rate", "of the cells called significant, the share expected to be so by chance; q is the"
          " smallest rate at which a cell is still called significant; family_p is stricter: the chance that any cell at all stands out as much",
          "Benjamini and Hochberg 1995; Westfall and Young 1993"),
)  # fmt: skip


def _of_metric(m: Metric) -> Entry:
    return Entry(m.name, m.title, m.definition, m.source, m.range, m.unit, m.chance)


GLOSSARY: Mapping[str, Entry] = MappingProxyType({e.name: e for e in (*TERMS, *map(_of_metric, METRICS.values()))})


def glossary_table() -> pa.Table:
    """One row per entry: name, title, definition, range, unit, chance, source; range, unit and chance are "" for terms."""
    return pa.Table.from_pylist([asdict(e) for e in GLOSSARY.values()])


def search(words: str) -> list[Entry]:
    """Entries that hold every word in name, title, definition or source, in any case; one called just so comes first."""
    asked = words.casefold().split()
    found = [e for e in GLOSSARY.values() if all(w in f"{e.name} {e.title} {e.definition} {e.source}".casefold() for w in asked)]
    return sorted(found, key=lambda e: words.casefold().strip() not in (e.name, e.title.casefold()))
