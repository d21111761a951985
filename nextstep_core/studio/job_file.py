"""Reading a job file, as a whole and with the line of what is wrong.

{"model": "...", "settings": {...} or [{...}, ...], "seeds": [...], "jobs": [{"prompt": "...", ...}, ...]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import NextStepError, check_choice, check_text, shown
from ..images.saving import FORMATS, QUALITY
from ..loading.documents import parse_object
from ..ranges import Range
from ..request.layout import IMAGE_SLOT
from ..request.presets import BUILT_IN, Preset, all_presets
from ..sampling.settings import SEED, GenerationSettings
from .job_keys import FILE_KEYS, JOB_KEYS, SETTINGS, number_key
from .jobs import Asked, BatchJob, Order
from .lines import Place, lines_of, where_of
from .names import DEFAULT_PATTERN, check_pattern
from .prompts import COMBINE, MEND, Lists, Prompt, fill, parse_lines, parse_table, prompts_of, read_text

PICTURES = Range("The number of pictures in a job", 1, 100_000)
# How the public guide calls three of the presets.
GUIDE_QUALITY = {"low": "draft", "medium": "standard", "high": "premium"}


@dataclass(frozen=True)
class Wishes:
    """What is asked beside the file, and wins over it: keys of SETTINGS, seeds, values of lists."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    format: str | None = None
    pattern: str | None = None


@dataclass(frozen=True)
class Reader:
    """Reads one file; knows where in it a value stands, the presets, and where input pictures may lie."""

    name: str
    lines: Mapping[Place, int]
    presets: Mapping[str, Preset]
    folder: Path | None
    wishes: Wishes

    def where(self, *place: str | int) -> str:
        return where_of(self.name, self.lines, place)

    def job(self, stated: Mapping[str, Any]) -> BatchJob:
        """The whole file, checked."""
        for key in stated:
            check_choice(f"{self.where(key)}: a key", key, FILE_KEYS)
        if "jobs" not in stated and "prompts" not in stated:
            raise NextStepError('{where} has neither "jobs" nor "prompts". Write one of them.', where=self.name)
        texts = {key: self._text(stated, key) for key in ("title", "model", "names") if key in stated}
        format, quality = stated.get("format", "png"), stated.get("quality", 90)
        check_choice(f"{self.where('format')}: format", format, FORMATS)
        quality = number_key(QUALITY).check(self.where("quality"), quality)
        pattern = self.wishes.pattern or texts.get("names") or DEFAULT_PATTERN
        check_pattern(pattern, self.where("names"))
        orders = tuple(self._orders(stated))
        return BatchJob(
            texts.get("title", Path(self.name).stem),
            orders,
            texts.get("model"),
            self.wishes.format or format,
            quality,
            pattern,
        )

    def _text(self, stated: Mapping[str, Any], key: str, *place: str | int) -> str:
        return check_text(f"{self.where(*place, key)}: {key}", stated[key])

    def _orders(self, stated: Mapping[str, Any]) -> list[Order]:
        lists = self._lists(stated)
        settings, seeds = self._settings(stated, ()), self._seeds(stated, ())
        jobs = list(self._jobs(stated, lists))
        if lists is not None:
            lists.check([prompt.text for prompt, *_ in jobs], self.where("lists"))
        pictures, counted = 0, []
        for prompt, images, own, place in jobs:
            of_job = self._settings(own, place, settings), self._seeds(own, place) if "seeds" in own else seeds
            of_job = of_job[0], self.wishes.seeds or of_job[1]
            pictures += (lists.count(prompt.text, prompt.name) if lists else 1) * len(of_job[0]) * len(of_job[1])
            counted.append((prompt, images, *of_job, place))
            replace(PICTURES, name=f"{self.name}: the number of pictures").check(pictures)
        orders = []
        for prompt, images, asked, seeds, place in counted:
            where = self.where(*place)
            for values in lists.combinations(prompt.text, prompt.name) if lists else [{}]:
                text, name = fill(prompt.text, values), fill(prompt.name, values)
                self._check_slots(text, images, where)
                for one in asked:
                    avoided = one.negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt
                    for seed in seeds:
                        orders.append(Order(text, avoided, images, one, seed, name, where))
        return orders

    def _jobs(
        self, stated: Mapping[str, Any], lists: Lists | None
    ) -> Iterator[tuple[Prompt, tuple[Path, ...], Mapping[str, Any], Place]]:
        """Every job and every bare prompt, with its place in the file."""
        if "prompts" in stated:
            items = {place[1]: line for place, line in self.lines.items() if len(place) == 2 and place[0] == "prompts"}
            for n, prompt in enumerate(prompts_of(stated["prompts"], self.name, items)):  # type: ignore[arg-type]
                yield prompt, (), {}, ("prompts", n)
        jobs = stated.get("jobs", [])
        if not isinstance(jobs, list):
            raise NextStepError("{where}: jobs is {value}; write a list.", where=self.where("jobs"), value=shown(jobs))
        for n, own in enumerate(jobs):
            place: Place = ("jobs", n)
            if not isinstance(own, dict):
                raise NextStepError("{where} is {value}; write an object.", where=self.where(*place), value=shown(own))
            for key in own:
                check_choice(f"{self.where(*place, key)}: a key", key, JOB_KEYS)
            if "prompt" not in own:
                raise NextStepError("{where}: the job has no prompt. Write one.", where=self.where(*place))
            negative = self._text(own, "negative_prompt", *place) if "negative_prompt" in own else None
            name = self._text(own, "name", *place) if "name" in own else ""
            text = self._text(own, "prompt", *place)
            yield Prompt(text, negative, name), self._images(own, place), own, place

    def _images(self, own: Mapping[str, Any], place: Place) -> tuple[Path, ...]:
        stated = own.get("images", [])
        where = self.where(*place, "images")
        if not isinstance(stated, list):
            raise NextStepError("{where}: images is {value}; write a list.", where=where, value=shown(stated))
        return tuple(self._image(name, self.where(*place, "images", n)) for n, name in enumerate(stated))

    def _image(self, name: object, where: str) -> Path:
        """A picture in the job's folder: a file from a stranger must not show what lies elsewhere."""
        from PIL import Image

        text = check_text(f"{where}: a picture's name", name)
        if self.folder is None:
            raise NextStepError("{where}: pictures are taken from beside a job file, and there is none.", where=where)
        try:
            path = (self.folder / text).resolve()
            if not path.is_relative_to(self.folder.resolve()):
                raise NextStepError(
                    "{where}: {name} lies outside of the job's folder. Put the picture beside the job file.",
                    where=where,
                    name=shown(text),
                )
            with Image.open(path) as image:
                image.size  # noqa: B018 - opening reads no more than this
        except NextStepError:
            raise
        except Exception as error:  # whatever is wrong with whichever kind of file
            raise NextStepError(
                "{where}: {name} is not a readable picture ({reason}).",
                where=where,
                name=shown(text),
                reason=type(error).__name__,
            ) from None
        return path

    def _check_slots(self, text: str, images: tuple[Path, ...], where: str) -> None:
        if (slots := text.count(IMAGE_SLOT)) not in {len(images), 0}:
            raise NextStepError(
                "{where}: the prompt has {slots} {slot} for {count} pictures. Write {slot} once for each.",
                where=where,
                slots=slots,
                slot=IMAGE_SLOT,
                count=len(images),
            )
        if slots and not images:
            raise NextStepError(
                "{where}: the prompt has {slot}, and the job no images. Name them.", where=where, slot=IMAGE_SLOT
            )

    def _lists(self, stated: Mapping[str, Any]) -> Lists | None:
        if "lists" not in stated:
            if self.wishes.lists:
                raise NextStepError("{where} has no lists whose values could be set.", where=self.name)
            return None
        values, where = stated["lists"], self.where("lists")
        if not isinstance(values, dict):
            raise NextStepError(
                '{where}: lists is {value}; write {{"name": ["first", "second"]}}.', where=where, value=shown(values)
            )
        for name, texts in values.items():
            at = self.where("lists", name)
            if not isinstance(texts, list):
                raise NextStepError(
                    "{where}: {name} is {value}; write a list.", where=at, name=shown(name), value=shown(texts)
                )
            for text in texts:
                check_text(f"{at}: {shown(name)}", text)
        for name in self.wishes.lists:
            check_choice(f"{self.name}: a list", name, values)
        combine = stated.get("combine", COMBINE[0])
        check_choice(f"{self.where('combine')}: combine", combine, COMBINE)
        return Lists({name: tuple(texts) for name, texts in values.items()} | dict(self.wishes.lists), combine)

    def _settings(self, stated: Mapping[str, Any], place: Place, above: Sequence[Asked] = (Asked(),)) -> list[Asked]:
        """The settings at a place, each over each of those above it; what was asked beside the file wins."""
        if "settings" not in stated:
            return list(above) if place else [self._asked(self.wishes.settings, (), Asked())]
        several = stated["settings"] if isinstance(stated["settings"], list) else [stated["settings"]]
        if not several:
            raise NextStepError("{where}: settings is an empty list.", where=self.where(*place, "settings"))
        found = []
        for n, one in enumerate(several):
            at: Place = (*place, "settings", n) if isinstance(stated["settings"], list) else (*place, "settings")
            if not isinstance(one, dict):
                raise NextStepError(
                    "{where}: settings is {value}; write an object.", where=self.where(*at), value=shown(one)
                )
            label = "" if len(several) == 1 else letter(n)
            found += [self._asked({"label": label or base.label} | one, at, base) for base in above]
        return [self._asked(self.wishes.settings, (), asked) for asked in found]

    def _asked(self, stated: Mapping[str, Any], place: Place, base: Asked) -> Asked:
        """What an object of settings says over `base`: its preset first, then its single values."""
        for key in stated:
            check_choice(f"{self.where(*place, key)}: a setting", key, SETTINGS)
        values = {key: SETTINGS[key].check(self.where(*place, key), value) for key, value in stated.items()}
        preset = values.pop("preset", None)
        if (quality := values.pop("quality", None)) is not None:
            check_choice(f"{self.where(*place, 'quality')}: quality", quality, [*GUIDE_QUALITY, *BUILT_IN])
            preset = preset or GUIDE_QUALITY.get(quality, quality)
        if preset is not None:
            check_choice(f"{self.where(*place, 'preset')}: preset", preset, self.presets)
            base = _of_preset(self.presets[preset], base)
        if "size" in values:
            values["width"], values["height"] = values.pop("size")
        if "guidance" in values:
            values["cfg"] = values.pop("guidance")
        asked = replace(base, **values)
        try:
            asked.over(GenerationSettings())
        except NextStepError as error:
            raise NextStepError("{where}: {reason}", where=self.where(*place), reason=error) from None
        return asked

    def _seeds(self, stated: Mapping[str, Any], place: Place) -> tuple[int, ...]:
        if "seeds" not in stated:
            return (0,)
        seeds, where = stated["seeds"], self.where(*place, "seeds")
        if isinstance(seeds, dict) and set(seeds) == {"first", "count"}:
            first = number_key(SEED, "first").check(where, seeds["first"])
            count = replace(PICTURES, name=f"{where}: count").check(seeds["count"])
            number_key(SEED, "the last seed").check(where, first + count - 1)
            return tuple(range(first, first + count))
        if not isinstance(seeds, list) or not seeds:
            raise NextStepError(
                '{where}: seeds is {value}; write a list, or {{"first": 1, "count": 20}}.',
                where=where,
                value=shown(seeds),
            )
        found = tuple(number_key(SEED).check(self.where(*place, "seeds", n), seed) for n, seed in enumerate(seeds))
        if len(set(found)) < len(found):
            raise NextStepError("{where}: a seed appears twice, which would draw a picture twice.", where=where)
        return found


def letter(n: int) -> str:
    """A, B, C, ... for settings without a label of their own; numbers after Z."""
    return chr(ord("A") + n) if n < 26 else str(n + 1)


def _of_preset(preset: Preset, base: Asked) -> Asked:
    stated: dict[str, Any] = {
        "steps": preset.steps,
        "cfg": preset.cfg,
        "cfg_img": preset.cfg_img,
        "shift": preset.shift,
    }
    base = replace(base, width=preset.width, height=preset.height)
    base = replace(base, negative_prompt=preset.negative_prompt or base.negative_prompt)
    return replace(base, **{name: value for name, value in stated.items() if value is not None})


def read_job(path: Path, wishes: Wishes = Wishes(), presets: Path | None = None) -> BatchJob:
    """A job file, or a file of prompts (.txt, .csv), checked as a whole: NextStepError, with the line, for the first
    thing that is wrong. `presets` is a user's own file of them."""
    text = read_text(path)
    if path.suffix.lower() == ".json":
        return parse_job(text, path.name, wishes, presets, path.parent)
    prompts = parse_table(text, path.name) if path.suffix.lower() == ".csv" else parse_lines(text, path.name)
    return job_of_prompts(prompts, path.stem, wishes, presets)


def parse_job(
    text: str, name: str, wishes: Wishes = Wishes(), presets: Path | None = None, folder: Path | None = None
) -> BatchJob:
    """A job file's text; input pictures are looked for in `folder`."""
    stated = parse_object(text, name, MEND)
    reader = Reader(name, lines_of(text), all_presets(presets) if presets else BUILT_IN, folder, wishes)
    return reader.job(stated)


def job_of_prompts(
    prompts: Sequence[Prompt], title: str, wishes: Wishes = Wishes(), presets: Path | None = None
) -> BatchJob:
    """A job of plain prompts, in the settings and with the seeds that are asked."""
    reader = Reader(title, {}, all_presets(presets) if presets else BUILT_IN, None, wishes)
    items = [{"prompt": p.text, "negative_prompt": p.negative_prompt, "name": p.name} for p in prompts]
    return reader.job({"jobs": [{k: v for k, v in item.items() if v is not None} for item in items], "title": title})
