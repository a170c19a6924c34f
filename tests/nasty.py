"""Text that breaks careless programs: as token, label, name of a document or a model, and in exported files."""

NASTY = (
    # markup and script
    "<script>window.__pwn=1</script>", "<img src=x onerror=window.__pwn=1>", "</span>", "<s>", "</script><script>window.__pwn=1</script>",
    "<!--<script>", '<a href="javascript:window.__pwn=1">x</a>', '"onmouseover="window.__pwn=1', "<svg/onload=window.__pwn=1>",
    "<iframe src=/beacon>", "]]>", "&lt;b&gt;", "&#60;b&#62;", "<style>*{display:none}</style>", "javascript:window.__pwn=1",
    # what Markdown, formulas and templates would read
    "![b](/beacon)", "[x](javascript:window.__pwn=1)", "$x^2$", "$$\\frac{1}{0}$$", ":material/home:", ":red[x]", "`", "```", "**", "__",
    "# x", "- x", "|a|b|", "~~x~~", "{{data}}", "{x}", "%{x}", "%s%n", "\\", "${x}", "<br>", "<extra>",
    # spreadsheets and shells
    "=1+1", "+1", "-1", "@SUM(A1)", "=cmd|'/c calc'!A1", "'", '"', ",", ";", "\t=1", "a,b\n=c", "＝1",
    # control characters, direction, width
    "\0", "\u202eabc", "\u2066x", "\u200b=1", "\ufeff=1", "\x1b[2J", "\r", "\r\n", "\x85", "\u2028", "\U000e0001", "\ufffe",
    # scripts and names
    "选", "سلام", "שלום", "e\u0301", "👩‍👩‍👧", "😀", "Z" * 300, "../../etc/passwd", "CON", " ", "",
)  # fmt: skip
