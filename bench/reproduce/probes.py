"""Probes of what a model knew before: prompts with questions about their pictures, and how a Qwen3-VL is asked them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from dopsd_fast.conditioning.vlm import IMAGE_TOKEN
from dopsd_fast.errors import UserError

FILE = "probes.jsonl"
FORM = '{"prompt": "...", "questions": ["...", ...]}'
REQUEST = "Please answer yes or no."


@dataclass(frozen=True)
class Probe:
    """A prompt, and questions about its picture to which yes is the right answer."""

    prompt: str
    questions: tuple[str, ...]


def read_probes(folder: Path) -> list[Probe]:
    """The probes of FOLDER/probes.jsonl, one a line, in its order; blank lines are skipped.

    Raises UserError, with file and line, for a line that is not FORM or has an empty prompt or question, and for a file
    that is missing, unreadable or without probes.
    """
    path = Path(folder) / FILE
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): it holds a line {FORM} for every probe") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    probes = [_probe(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not probes:
        raise UserError(f"{path} is empty: put a line {FORM} there for every probe, or remove it")
    return probes


def _probe(where: str, line: str) -> Probe:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error}): write {FORM}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: is a {type(record).__name__}, not an object: write {FORM}")
    for key in ("prompt", "questions"):
        if key not in record:
            raise UserError(f'{where}: has no "{key}": write {FORM}')
    prompt, questions = record["prompt"], record["questions"]
    if not _is_text(prompt):
        raise UserError(f'{where}: "prompt" is {prompt!r:.60}, not a text')
    if not isinstance(questions, list) or not questions:
        raise UserError(f'{where}: "questions" is {questions!r:.60}, not a list of at least one text')
    for question in questions:
        if not _is_text(question):
            raise UserError(f"{where}: a question is {question!r:.60}, not a text")
        if IMAGE_TOKEN in question:
            raise UserError(f"{where}: a question contains {IMAGE_TOKEN}, which stands for the picture: {question!r:.60}")
    return Probe(prompt, tuple(questions))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def has_head(folder: Path) -> bool:
    """Whether the weights in `folder` include a language head; one of random numbers would answer as well."""
    from safetensors import safe_open

    return any("lm_head" in name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys())


class Answerer:
    """A Qwen3-VL, opened, that says yes or no to questions about a picture."""

    def __init__(self, model, tokenizer, processor, where: Path):
        self.model, self.tokenizer, self.processor, self.where = model, tokenizer, processor, where
        self.yes, self.no = self.spellings("yes"), self.spellings("no")

    def spellings(self, word: str) -> list[int]:
        """Ids of the single tokens that spell `word`: as it is, capitalised, in capitals, each also after a space."""
        forms = [space + form for form in (word, word.capitalize(), word.upper()) for space in ("", " ")]
        found = [self.tokenizer(form, add_special_tokens=False).input_ids for form in forms]
        single = sorted({ids[0] for ids in found if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id})
        if not single:
            raise UserError(f"{self.where}: its tokenizer has no single token that spells {word!r}: use a Qwen3-VL")
        return single

    def share(self, picture: Image.Image, probe: Probe) -> float:
        """The share, in 0..1, of the probe's questions q with p(yes | picture, q) > p(no | picture, q).

        p: the probability of the next token after one user turn (picture, q, REQUEST), summed over the spellings. One
        question a call, without padding: an answer does not depend on what else is asked.
        """
        features = self.processor(images=[picture], return_tensors="pt").to(self.model.device)
        count = int(features["image_grid_thw"].prod()) // self.processor.merge_size**2
        yes = 0
        for question in probe.questions:
            ids = self.tokenizer(
                self.turn(question).replace(IMAGE_TOKEN, IMAGE_TOKEN * count), return_tensors="pt"
            ).input_ids.to(self.model.device)
            logits = self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
                pixel_values=features["pixel_values"],
                image_grid_thw=features["image_grid_thw"],
                use_cache=False,
                logits_to_keep=1,
            ).logits[0, -1].double()
            yes += bool(logits[self.yes].logsumexp(0) > logits[self.no].logsumexp(0))
        return yes / len(probe.questions)

    def turn(self, question: str) -> str:
        """The chat up to where the answer begins, with one IMAGE_TOKEN."""
        content = [{"type": "image"}, {"type": "text", "text": f"{question} {REQUEST}"}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        if text.count(IMAGE_TOKEN) != 1 or question.strip() not in text or text.rstrip().endswith("<think>"):
            raise UserError(f"{self.where}: its chat template does not let it answer a question about a picture at once")
        return text
