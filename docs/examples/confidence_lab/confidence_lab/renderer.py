from sftmix.components import Renderer
from sftmix.types import Message


class Lines(Renderer):
    """A line for each turn: the role, and what is said. The end of each turn is the tokenizer's eos."""

    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )

    def answer(self, message: Message) -> list[tuple[list[int], float]]:
        return [([*self.ids(message.content), self.tokenizer.eos_token_id], message.weight)]
