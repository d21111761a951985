import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

let wanted = new URLSearchParams(location.search).get("open"); // "<pack>/<template>"

app.registerExtension({
    name: "NextStep.OpenTemplate",
    async setup() {
        // A first start would cover the graph with the template browser.
        if (wanted) await app.extensionManager.setting.set("Comfy.TutorialCompleted", true);
    },
    async afterConfigureGraph() {
        if (!wanted) return;
        const [pack, name] = wanted.split("/").map(encodeURIComponent);
        wanted = null; // once: what the user opens later stays
        const template = await api.fetchApi(`/workflow_templates/${pack}/${name}.json`);
        const graph = await template.json();
        // Not inside the load that is under way, which restores what was open before.
        setTimeout(() => app.loadGraphData(graph, true, true, decodeURIComponent(name)));
    },
});
