"""What the page says, in English and Chinese.

The page holds both languages at once, each in an element with its ``lang``, and its style sheet shows one of them: so
a change of language computes nothing anew. Only labels of Gradio's own components are set by Python.
"""

from __future__ import annotations

from html import escape
from typing import Any, Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

TEXTS: dict[str, tuple[str, str]] = {
    # The frame
    "title": ("Inside VMamba", "透视 VMamba"),
    "tagline": (
        "Click on the picture. The patch you choose lights up all that it hears, route by route.",
        "点击图片。选中的图块会沿四条路线点亮它所“听到”的一切。",
    ),
    "theme": ("Light or dark", "浅色或深色"),
    "model": ("Model", "模型"),
    "examples": ("Example pictures", "示例图片"),
    "drop": ("Drop a picture here, paste one, or", "将图片拖到此处、粘贴，或"),
    "browse": ("choose a file", "选择文件"),
    "strength": ("Map", "热图"),
    "keys": ("Arrow keys move the patch.", "方向键可移动图块。"),
    "canvas": ("The picture as the network sees it; click on a patch", "网络所见的图片；请点击一个图块"),
    "network": ("The network: click on a block to look inside it", "网络结构：点击一个模块查看其内部"),
    "stem": ("stem", "主干入口"),
    "head": ("head", "输出头"),
    "stage": ("stage {stage}", "阶段 {stage}"),
    "block": ("Stage {stage}, block {block}", "阶段 {stage}，模块 {block}"),
    "nobody": ("Choose a picture to begin.", "请先选择一张图片。"),
    # Models
    "untrained": ("untrained, random weights", "未训练（随机权重）"),
    "published": ("published weights", "官方发布权重"),
    "classification": ("classification", "图像分类"),
    "segmentation": ("segmentation", "语义分割"),
    "detection": ("detection", "目标检测"),
    "beware": (
        "This network is untrained: its weights are random. What you see is the architecture, not anything learned.",
        "该网络未经训练，权重是随机的：您看到的是结构本身，而非学到的内容。",
    ),
    # Tabs
    "tab_routes": ("Routes", "路线"),
    "tab_memory": ("Memory", "记忆"),
    "tab_prediction": ("Prediction", "预测"),
    "tab_stages": ("Stages", "阶段"),
    "tab_classes": ("Classes", "类别依据"),
    "tab_field": ("Receptive field", "感受野"),
    "tab_scaling": ("Scaling", "计算代价"),
    "tab_order": ("Scan order", "扫描顺序"),
    # What the tabs say
    "routes": (
        "What the framed patch is made of in stage {stage}, block {block}. Along each route it hears only the patches"
        " that came before it; the others are veiled. What the routes bring together is {strength} times as strong"
        " as what the patch says itself.",
        "方框内的图块在阶段 {stage}、模块 {block} 中由什么构成。沿每条路线，它只能听到排在自己之前的图块，"
        "其余的被遮住。四条路线合起来的强度是图块自身直连项的 {strength} 倍。",
    ),
    "route": (
        "{share:.0%} of what it hears, from {reach:.0f} px away on average, half of it within {half} steps",
        "占其所听的 {share:.0%}，平均来自 {reach:.0f} 像素之外，一半来自 {half} 步以内",
    ),
    "memory": (
        "What “selective” means, in stage {stage}, block {block}: every patch chooses a step Δ. A large one overwrites"
        " the memory with this patch; a small one lets it pass.",
        "“选择性”的含义（阶段 {stage}，模块 {block}）：每个图块自己选择步长 Δ。"
        "步长大则用该图块改写记忆，步长小则让记忆保持不变。",
    ),
    "remembered": (
        "How long each patch is remembered: steps until half of the states have forgotten it. Lightest: to the end.",
        "每个图块被记住多久：到一半状态忘记它为止的步数。最亮表示一直记到最后。",
    ),
    "remembered_by": (
        "{middle:.0f} steps for a typical patch; {kept:.0%} of the states keep it to the end",
        "典型图块为 {middle:.0f} 步；{kept:.0%} 的状态把它记到最后",
    ),
    "remembered_by_all": (
        "A typical patch is remembered to the end, by {kept:.0%} of the states",
        "典型图块一直被记到最后，{kept:.0%} 的状态如此",
    ),
    "chosen": (
        "The step Δ that each patch chooses, from {least:.2g} (darkest) to {most:.2g} (lightest).",
        "每个图块选择的步长 Δ，从 {least:.2g}（最暗）到 {most:.2g}（最亮）。",
    ),
    "chosen_by": ("{middle:.2g} for a typical patch", "典型图块为 {middle:.2g}"),
    "rows": ("rows", "逐行"),
    "columns": ("columns", "逐列"),
    "rows_back": ("rows, back", "逐行，逆向"),
    "columns_back": ("columns, back", "逐列，逆向"),
    "heard": ("How far back it listens: share of all it hears", "能“听”多远：占其所听全部的份额"),
    "steps_back": ("from at most so many patches back along the route", "来自沿路线往回至多这么多个图块"),
    "stages": (
        "What the stages put out: early ones follow edges and texture, late ones tell things apart.",
        "各阶段的输出：浅层跟随边缘与纹理，深层区分事物。",
    ),
    "components": (
        "The three directions in which the patches of a stage differ most, as red, green and blue.",
        "图块差异最大的三个方向，以红、绿、蓝表示。",
    ),
    "stage_of": ("{rows}×{columns} patches, {channels} channels", "{rows}×{columns} 个图块，{channels} 个通道"),
    "energy": (
        "How far each patch is from the mean of the picture, from the least (darkest) to the most (lightest).",
        "每个图块偏离整幅图片均值的程度，从最小（最暗）到最大（最亮）。",
    ),
    "edges": ("follows the edges of the picture: {edges:.2f}", "与图片边缘的相关性：{edges:.2f}"),
    "classes": (
        "What made this answer: places of each stage that spoke for it (Grad-CAM).",
        "为何得出这个答案：各阶段中支持它的位置（Grad-CAM）。",
    ),
    "outlined": ("Outlined: the pixels that are explained.", "轮廓线内是所解释的像素。"),
    "nothing_found": ("The network finds no object in this picture.", "网络在这幅图片中没有找到任何物体。"),
    "grid": ("{rows}×{columns} patches", "{rows}×{columns} 个图块"),
    "nothing_for": (
        "{rows}×{columns} patches, of which none spoke for it",
        "{rows}×{columns} 个图块，其中没有一个支持它",
    ),
    "class": ("{name} (logit {score:.2f})", "{name}（得分 {score:.2f}）"),
    "field": (
        "Effective receptive field: which pixels the middle of stage {stage} hears, on a logarithmic scale down to a"
        " ten-thousandth of the loudest.",
        "有效感受野：阶段 {stage} 的中心位置能听到哪些像素（对数刻度，直到最强者的万分之一）。",
    ),
    "field_now": ("this network", "该网络"),
    "field_before": ("before training", "训练之前"),
    "field_of": (
        "half of it within a square of {half:.0f} px, 90 % within {most:.0f} px; 90 % in {area:.0%} of the pixels",
        "一半在边长 {half:.0f} 像素的正方形内，90 % 在 {most:.0f} 像素内；90 % 集中于 {area:.0%} 的像素",
    ),
    "field_side": ("side of a square around the middle, in pixels", "以中心为中点的正方形边长（像素）"),
    "field_share": ("Share of what is heard from inside the square", "来自正方形内部的份额"),
    "scaling": (
        "What a larger picture costs, counted and measured here, one picture at a time. An exponent of 1 means linear"
        " in pixels; attention tends to 2.",
        "图片变大的代价（在本机计数与测量，每次一张）。指数为 1 表示与像素数成线性；注意力机制趋向 2。",
    ),
    "flops": ("Multiply-accumulates", "乘加次数"),
    "seconds": ("seconds", "秒"),
    "exponent": ("exponent", "指数"),
    "pixels": ("pixels of the picture", "图片像素数"),
    "order": (
        "The order in which each of the four routes visits the patches. This network uses “{pattern}”.",
        "四条路线各自访问图块的顺序。该网络使用“{pattern}”。",
    ),
    "less": ("little", "弱"),
    "more": ("much", "强"),
    "prediction": ("What the network says of this picture.", "网络对这张图片的判断。"),
    "prediction_dense": (
        "What the network says of this picture, shown to it in {width}×{height} pixels, as for all that is seen on this"
        " page: few, so that you need not wait. “vmamba predict” takes the size that the network was trained for.",
        "网络对这张图片的判断。与本页其他内容一样，网络所见为 {width}×{height} 像素：像素较少，以免久等。"
        "“vmamba predict” 使用网络训练时的尺寸。",
    ),
    # Errors
    "bad_picture": ("This picture cannot be used.", "无法使用这张图片。"),
    "too_large": (
        "The file has {size:.0f} MB; at most {most:.0f} MB are taken.",
        "文件大小为 {size:.0f} MB；最多接受 {most:.0f} MB。",
    ),
    "no_data": ("No picture arrived.", "没有收到图片。"),
    "no_model": ("There is no such model in the list.", "列表中没有这个模型。"),
    "bad_model": ("This model cannot be used.", "无法使用该模型。"),
    "bad_choice": ("There is no such patch or block.", "没有这样的图块或模块。"),
    "cannot": ("This cannot be shown.", "无法显示。"),
    "failed": (
        "Something went wrong inside; the terminal shows what.",
        "内部出错，详情见终端。",
    ),
}  # fmt: skip

# Of the names that `vmamba.explain` gives to routes, the texts that stand for them here.
ROUTES = {"rows →": "rows", "columns ↓": "columns", "rows ← back": "rows_back", "columns ↑ back": "columns_back"}


def plain(key: str, language: Language, **values: Any) -> str:
    """A text in one language."""
    return TEXTS[key][LANGUAGES.index(language)].format(**values)


def both(key: str, **values: Any) -> str:
    """HTML with a text in all languages, of which the page shows one."""
    return "".join(f'<span lang="{language}">{escape(plain(key, language, **values))}</span>' for language in LANGUAGES)
