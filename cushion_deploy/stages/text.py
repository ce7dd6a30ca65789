"""Text: what a file or data set holds, with conversations rendered through the chat template of the model."""

from __future__ import annotations

from dataclasses import dataclass

from cushion_deploy.calib.corpora import SAMPLED, Corpus, Part, Rows, load_rows
from cushion_deploy.calib.rows import Chat
from cushion_deploy.errors import UsageError
from cushion_deploy.evaluate.chat import TODAY
from cushion_deploy.runtime.bundle import read_text_files
from cushion_deploy.runtime.chat import ChatTemplate
from cushion_deploy.stages.base import Derived, Node
from cushion_deploy.stages.load import ModelFiles
from cushion_deploy.stages.run import Inputs


@dataclass(frozen=True)
class ReadRows(Derived[Rows]):
    """The rows of a text: a file, a hub data set, prose that ships with CPython, or documents sampled from the model.

    Attributes:
        data: the recipe's setting; None for the offline default.
        part: calibration or evaluation.
        sample: documents from the model; None if the text does not use any.
    """

    data: str | None
    part: Part
    sample: Node[tuple[str, ...]] | None = None

    def make(self, inputs: Inputs) -> Rows:
        """Read the text."""
        sample = self.sample
        return load_rows(self.data, self.part, (lambda: inputs.get(sample)) if sample else None)


@dataclass(frozen=True)
class ReadText(Derived[Corpus]):
    """A text, with its conversations rendered.

    Attributes:
        rows: what the file or data set holds.
        files: the chat template; requested only if a row is a conversation.
    """

    rows: Node[Rows]
    files: Node[ModelFiles]

    @classmethod
    def of(cls, data: str | None, part: Part, sample: Node[tuple[str, ...]], files: Node[ModelFiles]) -> ReadText:
        """Return the node of a text; it depends on a sample only if the text contains one."""
        own = data == "self" or (data in SAMPLED and part == "calibration")
        return cls(ReadRows(data, part, sample if own else None), files)

    def make(self, inputs: Inputs) -> Corpus:
        """Render the conversations.

        Raises:
            UsageError: the model has no chat template, or it rejects a conversation; file and row are named.
        """
        rows = inputs.get(self.rows)
        return render_rows(rows, read_text_files(inputs.get(self.files).folder).chat_template if rows.chats else None)


def render_rows(rows: Rows, template: ChatTemplate | None) -> Corpus:
    """Return a corpus whose conversations are rendered as the model is prompted: without ``<bos>``.

    The prefix takes the place of the beginning-of-sequence token, and text without a prefix begins without it, too.

    Args:
        rows: a text.
        template: chat template of the model; None if it has none.

    Raises:
        UsageError: there is no template, or it rejects a conversation; file and row are named.
    """

    def render(chat: Chat) -> str:
        if template is None:
            raise UsageError(
                f"{chat.where} is a conversation, but the model has no chat template",
                hint="give rows with a 'text', or put the chat_template.jinja that the model was trained with "
                "beside its tokenizer",
            )
        try:
            text = template.render(
                chat.messages, add_generation_prompt=False, tools=chat.tools, strftime_now=TODAY.strftime
            )
        except UsageError as e:
            raise UsageError(f"{chat.where}: {e.message}", hint=e.hint) from e
        return text.removeprefix(template.special_tokens.get("bos_token", ""))

    return rows.rendered(render)
