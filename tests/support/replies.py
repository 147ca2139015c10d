"""Replies of a model that was given tools."""

# With the text and the calls, as (name, arguments).
WELL_FORMED = {
    "Hello!\nHow are you?": ("Hello!\nHow are you?", []),
    "": ("", []),
    "The Action: none.\n Action: x\nActions: a": ("The Action: none.\n Action: x\nActions: a", []),
    'Thought: hm\nAction: a b\nAction Input: {"x": [1, -2.5e3, true, null, {"y": "\\"\\u6cb3"}]}': (
        "Thought: hm",
        [("a b", {"x": [1, -2500.0, True, None, {"y": '"河'}]})],
    ),
    'Action: a  \n\nAction Input:\n{\n "x": "河流"\n}\n\nAction: b\nAction Input: {}\n': (
        "",
        [("a", {"x": "河流"}), ("b", {})],
    ),
    'Two.\n\nAction: a\nAction Input: {"q": "Action: c\\nAction Input: {}"}\nAction: a\nAction Input: {}': (
        "Two.\n",
        [("a", {"q": "Action: c\nAction Input: {}"}), ("a", {})],
    ),
}
MALFORMED = (
    "Action: calculator",
    "Action: calculator\nAction Input:",
    "Action: calculator\nAction Input: 12 + 7",
    'Action: calculator\nAction Input: {"expression": "12 + 7"',
    "Action: calculator\nAction Input: [1]",
    'Action:\nAction Input: {"a": 1}',
    'Action: a\nAction Input: {"a": 1}\nAction: b\nAction Input: {',
    "Action: calculator\nsome text",
    'Action: calculator\nsome text\nAction Input: {"a": 1}',
    'Action: calculator Action Input: {"a": 1}',
    'Action Input: {"a": 1}',
    'Action: a\nAction Input: {"a": 1}\nAction Input: {"a": 1}',
    'Action: a\nAction Input: {"a": 1}\nResponse: 3',
    'Action: a\nAction: b\nAction Input: {"a": 1}',
    'Action Input: {}\nAction: b\nAction Input: {"a": 1}',
)
NO_JSON = {
    "NaN": '{"a": NaN}',
    "infinity": '{"a": [-Infinity]}',
    "overflow": '{"a": 1e999}',
    "5000 digits": '{"a": %s}' % ("1" * 5000),
    "half of a surrogate pair": r'{"a": "\ud83d"}',
    "a key twice": '{"a": 1, "b": {"c": 1, "c": 2}}',
    "1500 brackets": "[" * 1500,
    "100,000 braces": '{"a":' * 100_000,
}
