import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "nextstep.studio",
  nodeCreated(node) {
    if (node.comfyClass !== "NextStepBatchStudio") return;
    const open = () => {
      const folder = node.widgets.find((widget) => widget.name === "folder").value;
      window.open(api.apiURL(`/nextstep/report?${new URLSearchParams({ folder })}`), "_blank", "noopener");
    };
    const button = node.addWidget("button", "Open report", null, open);
    button.serialize = false;
    button.tooltip = "Shows what is in the folder, also while it is drawn.";
  },
});
