"""A browser in another language, in which nobody has set one: nodes, errors and help are in it all the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripts.comfy_server import ComfyServer
from scripts.workflows import FIRST_RUN, read_workflow

READY = "window.app?.graph && app.extensionManager && Object.keys(LiteGraph.registered_node_types).length > 100"
WRONG = {  # a latent of 4 channels, which is found wrong when it runs
    "1": {"class_type": "NextStepModelLoader", "inputs": {"model_name": "tiny (embedded)", "dtype": "fp32"}},
    "2": {"class_type": "NextStepTextEncode", "inputs": {"model": ["1", 0], "prompt": "a red circle"}},
    "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "4": {
        "class_type": "NextStepSampler",
        "inputs": {"model": ["1", 0], "positive": ["2", 0], "latent": ["3", 0], "seed": 1, "steps": 4, "cfg": 3.0},
    },
    "5": {"class_type": "NextStepVAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 1]}},
    "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
}
RUN = """() => new Promise(async done => {
    app.api.addEventListener('execution_success', () => done('success'), {once: true});
    app.api.addEventListener('execution_error', e => done(e.detail.exception_message), {once: true});
    await app.queuePrompt(0, 1);
})"""
ADD = """type => {
    app.graph.clear();
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    Object.assign(app.canvas.ds, {scale: 1, offset: [500, 250]});
    node.pos = [0, 0];
    app.canvas.selectNode(node);
    app.canvas.setDirty(true, true);
    return node.title;
}"""
TEXTS = {
    "ko-KR": (
        "NextStep 샘플러",
        "NextStep 빈 잠재 이미지를 쓰세요.",
        "왼쪽 위에서 오른쪽 아래로 정사각형을",
        "스텝 수",
    ),
    "ja": (
        "NextStep サンプラー",
        "「NextStep 空の潜在画像」を使ってください。",
        "左上から右下へ、正方形を",
        "ステップ数",
    ),
    "zh-CN": ("NextStep 采样器", "请使用“NextStep 空 Latent”。", "从左上到右下逐个方块", "步数"),
}


RUN_BUTTONS = {"ko-KR": "실행", "ja": "実行", "zh-CN": "运行"}
DOT = """() => {  // at the left of the title, where a click opens a node and closes it
    const node = app.graph._nodes.find(node => node.flags.collapsed), {scale, offset} = app.canvas.ds;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    return [canvas.x + (node.pos[0] + 15 + offset[0]) * scale, canvas.y + (node.pos[1] - 15 + offset[1]) * scale];
}"""


def keep(page, name: str) -> None:
    if folder := os.environ.get("NEXTSTEP_SCREENSHOTS"):
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.fixture(params=TEXTS)
def foreign(request, host: ComfyServer, browser):
    """(the language, the frontend in a browser of that language)."""
    context = browser.new_context(locale=request.param, viewport={"width": 1600, "height": 900})
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{host.port}", wait_until="domcontentloaded")
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_timeout(2000)  # a first start greets with the templates
    page.keyboard.press("Escape")
    page.get_by_role("dialog").first.wait_for(state="hidden")
    yield request.param, page
    context.close()


def test_nodes_errors_and_help_are_in_the_browser_s_language(foreign) -> None:
    language, page = foreign
    title, advice, first_words, label = TEXTS[language]
    assert page.evaluate(ADD, "NextStepSampler") == title
    page.get_by_test_id("info-button").click()
    page.get_by_text(first_words).first.wait_for()
    picture = page.locator("img[src*='NextStepSampler.png']").first
    picture.wait_for()
    assert page.evaluate("picture => picture.naturalWidth", picture.element_handle()) > 100
    assert page.get_by_role("cell", name=label, exact=True).count()
    keep(page, f"help-{language}")
    page.evaluate("prompt => app.loadApiJson(prompt, 'wrong')", WRONG)
    assert advice in page.evaluate(RUN)
    more = page.get_by_test_id("error-overlay-see-errors")  # newer frontends show what was said only when asked
    page.get_by_text(advice).or_(more).first.wait_for()
    if more.count():
        more.click()
    page.get_by_text(advice).first.wait_for()
    keep(page, f"error-{language}")


def test_a_note_in_these_languages_opens_over_the_template(foreign) -> None:
    language, page = foreign
    page.evaluate("workflow => app.loadGraphData(workflow, true, true, 'note')", read_workflow(FIRST_RUN))
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    run = page.locator("strong").filter(has_text=RUN_BUTTONS[language])
    page.wait_for_timeout(1000)
    assert not run.first.is_visible(), "closed, it is in nobody's way"
    box = page.evaluate(DOT)
    page.mouse.click(box[0], box[1])
    run.first.wait_for()
    keep(page, f"note-{language}")
