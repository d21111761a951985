"""Errors in the language that the user's ComfyUI shows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from comfy_graph import ComfyGraph, node, text_to_image


@pytest.fixture
def chosen(graph: ComfyGraph):
    """Writes the setting as the frontend does."""
    import folder_paths

    file = Path(folder_paths.get_user_directory(), "default", "comfy.settings.json")
    file.parent.mkdir(parents=True, exist_ok=True)

    yield lambda language: file.write_text(json.dumps({"Comfy.Locale": language}))
    file.unlink(missing_ok=True)


def wrong_latent() -> dict:
    """A latent of 4 channels, which is found wrong when the sampler runs."""
    return text_to_image() | {"latent": node("EmptyLatentImage", width=64, height=64, batch_size=1)}


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("ko", ["잠재 데이터의 형태가 (1, 4, 8, 8)입니다", "NextStep 빈 잠재 이미지를 쓰세요."]),
        ("zh", ["Latent 的形状为 (1, 4, 8, 8)", "请使用“NextStep 空 Latent”。"]),
        ("zh-TW", ["Latent 的形状为 (1, 4, 8, 8)"]),
        ("ja", ["潜在の形状が (1, 4, 8, 8) です", "「NextStep 空の潜在画像」を使ってください。"]),
        ("en", ["The latent has the shape (1, 4, 8, 8)", "Use NextStep Empty Latent."]),
        ("fr", ["The latent has the shape"]),
        ("../ko", ["The latent has the shape"]),
        ("", ["The latent has the shape"]),
        (5, ["The latent has the shape"]),
    ],
)
def test_an_error_is_told_in_the_language_of_the_setting(graph: ComfyGraph, chosen, language, words) -> None:
    chosen(language)
    kind, said = graph.ending(wrong_latent())
    assert kind.endswith("NextStepError") and all(word in said for word in words), said


@pytest.mark.parametrize(("language", "label"), [("ko", "너비"), ("zh", "宽度"), ("ja", "幅"), ("en", "width")])
def test_what_the_host_refuses_at_once_names_the_widget_by_its_label(graph, chosen, language, label) -> None:
    chosen(language)
    validate = graph.nodes.NODE_CLASS_MAPPINGS["NextStepEmptyLatent"].validate_inputs
    assert str(validate(width=5000)).startswith(label) and "4096" in str(validate(width=5000))
    assert validate(width=64, height=64) is True


def test_a_blocked_output_says_why_in_the_language_too(graph: ComfyGraph, chosen) -> None:
    chosen("ko")
    prompt = {
        "picture": node("EmptyImage", width=64, height=64, batch_size=1, color=0),
        "prepared": node(
            "NextStepPreparePicture",
            image=["picture", 0], mode="crop", size="nearest aspect ratio", base="256", width=64, height=64,
        ),
        "kept": node("KeepValue", value=["prepared", 6]),
    }  # fmt: skip
    graph.run(prompt)
    said = [data["exception_message"] for name, data in graph.server.events if name == "execution_error"]
    assert "NextStep 그림 준비에 VAE를 연결하세요." in said[-1]


def test_the_log_has_the_english_sentence_as_well(graph: ComfyGraph, chosen, caplog) -> None:
    chosen("ja")
    graph.ending(wrong_latent())
    assert "The latent has the shape (1, 4, 8, 8)" in caplog.text and "潜在の形状" in caplog.text


@pytest.mark.parametrize("written", ["", "{", "[]", '"ko"', "[" * 100_000, "\ud800"])
def test_settings_that_cannot_be_read_are_no_language(graph: ComfyGraph, chosen, written: str) -> None:
    import folder_paths

    screen = graph.pack("nodes.host.screen")
    Path(folder_paths.get_user_directory(), screen.SETTINGS).write_bytes(written.encode(errors="surrogatepass"))
    assert screen.user_language() == ""


def browsers(*languages: str | None) -> dict[str, SimpleNamespace]:
    """What the server keeps of those that are connected."""
    headers = [{} if language is None else {"Accept-Language": language} for language in languages]
    return {str(n): SimpleNamespace(_req=SimpleNamespace(headers=header)) for n, header in enumerate(headers)}


@pytest.mark.parametrize(
    ("connected", "language"),
    [
        (browsers("ko-KR,ko;q=0.9,en;q=0.8"), "ko-KR"),
        (browsers("ja", "ja;q=0.9"), "ja"),
        (browsers("ko-KR,ko;q=0.9", "en-US,en;q=0.9"), ""),
        (browsers(None), ""),
        ({"0": SimpleNamespace()}, ""),
        ({}, ""),
    ],
)
def test_without_the_setting_the_browser_decides(graph: ComfyGraph, monkeypatch, connected, language: str) -> None:
    screen = graph.pack("nodes.host.screen")
    monkeypatch.setattr(screen, "_server", lambda: SimpleNamespace(sockets=connected))
    assert screen.user_language() == language


def test_the_setting_goes_before_the_browser_and_many_users_before_both(graph, chosen, monkeypatch) -> None:
    screen = graph.pack("nodes.host.screen")
    monkeypatch.setattr(screen, "_server", lambda: SimpleNamespace(sockets=browsers("ko")))
    chosen("ja")
    assert screen.user_language() == "ja"
    monkeypatch.setattr(screen.args, "multi_user", True)
    assert screen.user_language() == "", "nobody knows which of them it is"


def test_half_an_update_of_the_texts_leaves_english(graph: ComfyGraph, chosen, monkeypatch, tmp_path: Path) -> None:
    language = graph.pack("nodes.language")
    (tmp_path / "ko").mkdir()
    (tmp_path / "ko" / language.SENTENCES).write_text('{"The prompt')
    monkeypatch.setattr(language, "LOCALES", tmp_path)
    language.catalogue.cache_clear()
    chosen("ko")
    try:
        assert "The latent has the shape" in graph.ending(wrong_latent())[1]
    finally:
        language.catalogue.cache_clear()


def test_every_node_tells_its_errors_in_the_users_language(graph: ComfyGraph) -> None:
    speaking = graph.pack("nodes.language").Node
    ours = {name: kind for name, kind in graph.nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("NextStep")}
    assert ours and not [name for name, kind in ours.items() if not issubclass(kind, speaking)]


def test_what_stays_on_a_node_is_in_the_language_too(graph: ComfyGraph, chosen, monkeypatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(graph.pack("nodes.host"), "show_text", shown.append)
    chosen("ko")
    graph.free()
    prompt = text_to_image(seed=731)
    prompt["resume"] = node("NextStepResume", latent=["latent", 0], filename_prefix="none")
    prompt["sampler"]["inputs"]["latent"] = ["resume", 0]
    graph.run(prompt)
    assert any("가중치 저장 형식: float32" in text for text in shown), shown
    assert any("새 그림을 시작합니다" in text for text in shown), shown
    assert any(text.startswith("12토큰, ") and text.endswith("초") for text in shown), shown
