"""Conversations in windows of one row each, to copy: `--renderer packing.Packed`."""

from dataclasses import replace

from sftmix.text import ChatTemplate, EncodedRow


class Packed(ChatTemplate):
    """Conversations one after the other, in windows of at most data.max_length tokens."""

    def windows(self, examples, length):
        first, names, ids, spans, weights, starts = None, [], [], [], [], []
        for example, row in examples:
            if len(ids) + len(row.ids) > length:
                yield replace(first, id="+".join(names)), EncodedRow([], "", ids, spans, weights, starts)
                first, names, ids, spans, weights, starts = None, [], [], [], [], []
            first = first or example
            names.append(example.id)
            starts.append(len(ids))
            spans += [(start + len(ids), stop + len(ids)) for start, stop in row.spans]
            weights += row.span_weights
            ids = [*ids, *row.ids]
        if first:
            yield replace(first, id="+".join(names)), EncodedRow([], "", ids, spans, weights, starts)
