"""The small generative grammar of the tiny model's world, in English and Chinese, and its recogniser.

A grammar maps a symbol to its productions; `{name}` in a production stands for another symbol. It has no recursion.
`paragraph` chooses a scene (who, which season, which things) and generates sentences that agree with it;
`is_well_formed` tells whether a sentence parses.
"""

import functools
import random
import re


KINDS = ("water", "plant", "flyer", "walker", "land")
SEASONS = ("spring", "summer", "autumn", "winter")
# Who found something, and the pronoun that later sentences use for them.
PEOPLE = {
    "en": {
        "we": "We",
        "my friends and I": "We",
        "my sister and I": "We",
        "the children": "They",
        "the travellers": "They",
    },
    "zh": {"我们": "我们", "我和朋友们": "我们", "我和妹妹": "我们", "孩子们": "他们", "旅行者们": "他们"},
}

EN = {
    "sentence": ["{open}", "{about}", "{weather}", "{act}", "{again}", "{close}"],
    "open": [
        "{lead}, {who} {saw} {thing} {where}.",
        "{lead}, {who} {saw} {thing}.",
        "{lead}, {who} {saw} that {news}.",
    ],
    "lead": ["{lead.any}", "{lead.spring}", "{lead.summer}", "{lead.autumn}", "{lead.winter}"],
    "lead.any": [
        "Coming to the beautiful nature",
        "Walking along the quiet path",
        "Early in the morning",
        "Far from the noisy city",
        "At the foot of the mountain",
        "After a long journey",
        "Leaving the old town",
        "On the way to the village",
    ],
    "lead.spring": ["In spring", "On a warm spring morning", "When the flowers opened"],
    "lead.summer": ["In summer", "On a bright summer day", "When the days grew long"],
    "lead.autumn": ["In autumn", "On a clear autumn afternoon", "When the leaves turned red"],
    "lead.winter": ["In winter", "On a cold winter day", "After the first snow"],
    "who": list(PEOPLE["en"]),
    "Pron": ["We", "They"],
    "saw": ["found", "saw", "discovered"],
    "thing": [f"{{{kind}.np}}" for kind in KINDS],
    "where": [
        "behind the hill",
        "near the old bridge",
        "beside the road",
        "at the edge of the forest",
        "in the quiet valley",
    ],
    "news": [
        "the air was {air}",
        "the sky was {sky}",
        "the air was {air} and the sky was {sky}",
        "the world was full of {full}",
    ],
    "air": ["fresh", "cool and clean", "sweet"],
    "sky": ["blue", "high and clear", "as blue as the sea"],
    "full": ["life", "colour", "small wonders", "birdsong"],
    "about": [f"{{about.{kind}}}" for kind in KINDS],
    "weather": ["{weather.any}", "{weather.spring}", "{weather.summer}", "{weather.autumn}", "{weather.winter}"],
    "weather.any": [
        "The sun was {sun}.",
        "White clouds {cloud} across the sky.",
        "A gentle wind {wind} through the {trees}.",
        "The air smelled of {smell}.",
    ],
    "sun": ["warm and bright", "rising slowly", "shining on the fields"],
    "cloud": ["moved slowly", "sailed", "drifted"],
    "wind": ["passed", "blew", "whispered"],
    "trees": ["trees", "leaves", "tall grass"],
    "smell": ["grass and flowers", "rain", "pine and earth"],
    "weather.spring": ["The spring rain was soft and warm.", "Everything was {green} again in the spring sun."],
    "green": ["green", "young", "fresh"],
    "weather.summer": [
        "The summer sun was hot, but the shade was cool.",
        "In the summer heat the {insects} sang all day.",
    ],
    "insects": ["cicadas", "crickets"],
    "weather.autumn": ["Red and yellow leaves {fell} to the ground.", "The autumn air was cool and dry."],
    "fell": ["fell", "floated", "danced"],
    "weather.winter": ["Snow covered the {covered}.", "The winter air was cold and clean."],
    "covered": ["fields", "roofs", "mountains", "silent path"],
    "act": [
        "{Pron} sat {seat} and {rest}.",
        "{Pron} {went} and {rest}.",
        "{Pron} took out {lunch} and ate it {seat}.",
        "{Pron} stopped to {stop}.",
    ],
    "seat": ["under a tall tree", "on a flat stone", "on the soft grass", "in the shade"],
    "rest": [
        "listened to the birds",
        "talked about the journey",
        "looked at the distant mountains",
        "sang an old song",
    ],
    "went": ["walked slowly", "followed the path", "climbed the hill", "crossed the bridge"],
    "lunch": ["bread and cheese", "some fruit", "a simple lunch"],
    "stop": ["take a picture", "rest for a while", "drink some water", "enjoy the view"],
    "again": ["{later}, {who} also {saw} {thing}.", "{later}, {who} also {saw} {thing} {where}."],
    "later": ["Later", "After that", "A little farther on", "Before noon", "In the afternoon"],
    "close": [
        "In the evening {who} went home {mood}.",
        "It was a day that {who} will never forget.",
        "{Pron} hope to come back {back}.",
        "Nature is {praise}.",
    ],
    "mood": ["happily", "slowly under the stars", "with a light heart"],
    "back": ["next year", "soon", "with more friends"],
    "praise": ["the best teacher", "full of wonders", "a book without an end", "a friend to everyone"],
    # water
    "water": ["river", "stream", "lake", "pond", "waterfall", "spring"],
    "water.np": ["a {water.adj} {water}"],
    "water.adj": ["clear", "quiet", "cold", "deep", "small", "beautiful"],
    "about.water": [
        "The water of the {water} was {water.like}.",
        "The {water} {water.did}.",
        "{water.fish} swam in the {water}.",
        "The {water} looked like {water.look}.",
    ],
    "water.like": ["as clear as glass", "cool and sweet", "so clear that we could see the stones"],
    "water.did": [
        "shone in the sun",
        "sang softly among the stones",
        "reflected the white clouds",
        "was never silent",
    ],
    "water.fish": ["Small fish", "Two ducks", "A family of swans"],
    "water.look": ["a silver ribbon", "a mirror", "a piece of the sky"],
    # plant
    "plant": ["meadow", "forest", "garden", "orchard", "bamboo grove", "field of flowers"],
    "plant.np": ["a {plant.adj} {plant}"],
    "plant.adj": ["green", "wide", "sunny", "peaceful", "wild"],
    "about.plant": [
        "The {plant} was full of {plant.full}.",
        "In the {plant} {plant.who} {plant.did}.",
        "The colours of the {plant} were {plant.colour}.",
        "The {plant} smelled {plant.smell}.",
    ],
    "plant.full": ["bees and butterflies", "sweet berries", "soft light", "small white flowers"],
    "plant.who": ["a farmer", "an old woman", "a little girl"],
    "plant.did": ["picked flowers", "gathered herbs", "watered the young trees"],
    "plant.colour": ["bright and warm", "like a painting", "softer than silk"],
    "plant.smell": ["sweet", "of honey", "fresh after the rain"],
    # animals that fly
    "flyer": ["swallow", "heron", "lark", "crane", "butterfly", "magpie"],
    "flyer.np": ["a {flyer.adj} {flyer}"],
    "flyer.adj": ["white", "lonely", "graceful", "little", "bright"],
    "about.flyer": [
        "The {flyer} {flyer.did}.",
        "The {flyer} spread its wings and {flyer.flew}.",
        "{Pron} watched the {flyer} until it {flyer.gone}.",
    ],
    "flyer.did": ["rested on a branch", "circled above the trees", "was not afraid of people"],
    "flyer.flew": ["flew to the south", "rose into the sky", "crossed the valley"],
    "flyer.gone": ["disappeared behind the trees", "became a small point", "flew away"],
    # animals that walk
    "walker": ["deer", "rabbit", "squirrel", "fox", "hedgehog", "goat"],
    "walker.np": ["a {walker.adj} {walker}"],
    "walker.adj": ["young", "brown", "shy", "curious", "sleepy"],
    "about.walker": [
        "The {walker} {walker.did}.",
        "The {walker} looked at us and {walker.then}.",
        "When {pron} came closer, the {walker} {walker.then}.",
    ],
    "pron": ["we", "they"],
    "walker.did": ["ate grass quietly", "was looking for food", "slept under a bush", "drank from a small pool"],
    "walker.then": ["ran into the forest", "did not move", "hid behind a tree", "went on eating"],
    # land and buildings
    "land": ["mountain", "hill", "village", "temple", "stone bridge", "tower"],
    "land.np": ["a {land.adj} {land}"],
    "land.adj": ["quiet", "distant", "famous", "high", "lonely"],
    "about.land": [
        "The {land} was {land.was}.",
        "From the {land} {pron} could see {land.view}.",
        "People say that the {land} is {land.say}.",
    ],
    "land.was": ["wrapped in mist", "golden in the evening light", "very old", "surrounded by pines"],
    "land.view": ["the whole valley", "the distant sea", "fields and rivers", "the roofs of the town"],
    "land.say": ["a thousand years old", "the home of a poet", "the most beautiful place in the country"],
}

ZH = {
    "sentence": ["{open}", "{about}", "{weather}", "{act}", "{again}", "{close}"],
    "open": ["{lead}，{who}{saw}{where}有{thing}。", "{lead}，{who}{saw}了{thing}。", "{lead}，{who}{saw}{news}。"],
    "lead": ["{lead.any}", "{lead.spring}", "{lead.summer}", "{lead.autumn}", "{lead.winter}"],
    "lead.any": [
        "来到美丽的大自然",
        "走在安静的小路上",
        "一大早",
        "离开喧闹的城市",
        "来到山脚下",
        "经过长长的旅途",
        "走出古老的小镇",
        "在去村子的路上",
    ],
    "lead.spring": ["春天里", "在一个温暖的春日早晨", "当花儿开放的时候"],
    "lead.summer": ["夏天里", "在一个晴朗的夏日", "当白天变长的时候"],
    "lead.autumn": ["秋天里", "在一个凉爽的秋日下午", "当树叶变红的时候"],
    "lead.winter": ["冬天里", "在一个寒冷的冬日", "下过第一场雪"],
    "who": list(PEOPLE["zh"]),
    "Pron": ["我们", "他们"],
    "saw": ["发现", "看到"],
    "thing": [f"{{{kind}.np}}" for kind in KINDS],
    "where": ["山后", "古桥旁边", "路边", "森林边上", "安静的山谷里"],
    "news": ["空气{air}", "天空{sky}", "空气{air}，天空{sky}", "世界充满了{full}"],
    "air": ["很清新", "又凉爽又干净", "带着甜味"],
    "sky": ["很蓝", "又高又远", "像大海一样蓝"],
    "full": ["生机", "色彩", "小小的奇迹", "鸟儿的歌声"],
    "about": [f"{{about.{kind}}}" for kind in KINDS],
    "weather": ["{weather.any}", "{weather.spring}", "{weather.summer}", "{weather.autumn}", "{weather.winter}"],
    "weather.any": ["阳光{sun}。", "白云在天上{cloud}。", "微风{wind}{trees}。", "空气里有{smell}的香味。"],
    "sun": ["温暖而明亮", "慢慢升起", "洒在田野上"],
    "cloud": ["慢慢地走", "轻轻地飘", "自由地游"],
    "wind": ["吹过", "穿过", "轻轻抚摸着"],
    "trees": ["树林", "树叶", "高高的草"],
    "smell": ["青草和花", "雨水", "松树和泥土"],
    "weather.spring": ["春雨又轻又暖。", "春天的阳光下，一切都{green}。"],
    "green": ["绿了", "醒了", "充满希望"],
    "weather.summer": ["夏天的太阳很热，树下却很凉快。", "夏日里，{insects}整天歌唱。"],
    "insects": ["知了", "蟋蟀"],
    "weather.autumn": ["红色和黄色的树叶{fell}。", "秋天的空气凉爽而干燥。"],
    "fell": ["落到地上", "在空中飞舞", "铺满了小路"],
    "weather.winter": ["白雪盖住了{covered}。", "冬天的空气又冷又干净。"],
    "covered": ["田野", "屋顶", "群山", "安静的小路"],
    "act": [
        "{Pron}坐在{seat}，{rest}。",
        "{Pron}{went}，{rest}。",
        "{Pron}拿出{lunch}，坐在{seat}吃了起来。",
        "{Pron}停下来{stop}。",
    ],
    "seat": ["大树下", "平平的石头上", "柔软的草地上", "树荫里"],
    "rest": ["听着鸟儿唱歌", "谈论着旅途", "望着远处的群山", "唱起了一首老歌"],
    "went": ["慢慢地走着", "沿着小路向前走", "爬上山坡", "走过小桥"],
    "lunch": ["面包和奶酪", "一些水果", "简单的午饭"],
    "stop": ["拍照", "休息了一会儿", "喝了一点水", "欣赏风景"],
    "again": ["{later}，{who}又{saw}了{thing}。", "{later}，{who}又{saw}{where}有{thing}。"],
    "later": ["后来", "在这之后", "再往前走", "中午以前", "到了下午"],
    "close": [
        "傍晚，{who}{mood}回家了。",
        "这是{who}永远不会忘记的一天。",
        "{Pron}希望{back}再来。",
        "大自然是{praise}。",
    ],
    "mood": ["高高兴兴地", "在星光下慢慢地", "带着轻松的心情"],
    "back": ["明年", "很快", "和更多的朋友"],
    "praise": ["最好的老师", "一个充满奇迹的世界", "一本没有结尾的书", "每个人的朋友"],
    # water
    "water": ["小河", "小溪", "大河", "山泉", "瀑布", "江水"],
    "water.np": ["一条{water.adj}的{water}"],
    "water.adj": ["清澈", "安静", "冰凉", "弯弯", "美丽"],
    "about.water": [
        "这条{water}的水{water.like}。",
        "这条{water}{water.did}。",
        "{water.fish}在{water}里游来游去。",
        "这条{water}看起来像{water.look}。",
    ],
    "water.like": ["像玻璃一样清", "又凉又甜", "清得能看见石头"],
    "water.did": ["在阳光下闪闪发光", "在石头间轻轻歌唱", "映着白云", "从来不会安静"],
    "water.fish": ["小鱼", "两只鸭子", "一群天鹅"],
    "water.look": ["一条银色的丝带", "一面镜子", "一片天空"],
    # plant
    "plant": ["草地", "森林", "花园", "果园", "竹林", "花海"],
    "plant.np": ["一片{plant.adj}的{plant}"],
    "plant.adj": ["绿色", "宽阔", "明亮", "宁静", "茂盛"],
    "about.plant": [
        "这片{plant}里到处是{plant.full}。",
        "{plant.who}在这片{plant}里{plant.did}。",
        "这片{plant}的颜色{plant.colour}。",
        "这片{plant}{plant.smell}。",
    ],
    "plant.full": ["蜜蜂和蝴蝶", "甜甜的野果", "柔和的光", "白色的小花"],
    "plant.who": ["一位农民", "一位老奶奶", "一个小女孩"],
    "plant.did": ["采花", "采草药", "给小树浇水"],
    "plant.colour": ["明亮而温暖", "像一幅画", "比丝绸还柔和"],
    "plant.smell": ["散发着甜味", "有蜂蜜的味道", "在雨后特别清新"],
    # animals that fly
    "flyer": ["燕子", "白鹭", "云雀", "仙鹤", "蝴蝶", "喜鹊"],
    "flyer.np": ["一只{flyer.adj}的{flyer}"],
    "flyer.adj": ["雪白", "孤单", "优雅", "小小", "可爱"],
    "about.flyer": [
        "这只{flyer}{flyer.did}。",
        "这只{flyer}张开翅膀，{flyer.flew}。",
        "{Pron}看着这只{flyer}，直到它{flyer.gone}。",
    ],
    "flyer.did": ["停在树枝上", "在树林上空盘旋", "一点也不怕人"],
    "flyer.flew": ["飞向南方", "飞上天空", "飞过山谷"],
    "flyer.gone": ["消失在树林后面", "变成一个小点", "飞走了"],
    # animals that walk
    "walker": ["小鹿", "野兔", "松鼠", "狐狸", "刺猬", "山羊"],
    "walker.np": ["一只{walker.adj}的{walker}"],
    "walker.adj": ["年幼", "棕色", "害羞", "好奇", "贪睡"],
    "about.walker": [
        "这只{walker}{walker.did}。",
        "这只{walker}看了看我们，{walker.then}。",
        "当{Pron}走近的时候，这只{walker}{walker.then}。",
    ],
    "walker.did": ["安静地吃草", "正在找吃的", "在灌木下睡觉", "在水边喝水"],
    "walker.then": ["跑进了森林", "一动也不动", "躲到了树后", "又继续吃东西"],
    # land and buildings
    "land": ["高山", "山峰", "村庄", "寺庙", "石桥", "古塔"],
    "land.np": ["一座{land.adj}的{land}"],
    "land.adj": ["安静", "遥远", "有名", "高高", "孤独"],
    "about.land": [
        "这座{land}{land.was}。",
        "在这座{land}上，{Pron}能看见{land.view}。",
        "人们说这座{land}是{land.say}。",
    ],
    "land.was": ["被雾气包围着", "在夕阳里金光闪闪", "非常古老", "四周都是松树"],
    "land.view": ["整个山谷", "远处的大海", "田野和河流", "小镇的屋顶"],
    "land.say": ["一千年前的", "一位诗人的家乡", "全国最美的地方"],
}

GRAMMARS = {"en": EN, "zh": ZH}
_SLOT = re.compile(r"\{([\w.]+)\}")


def generate(symbol: str, rng: random.Random, language: str = "en", bound: dict[str, str] | None = None) -> str:
    """Expand `symbol` at random. Symbols in `bound` have a fixed text; nouns are added to it once chosen."""
    bound = {} if bound is None else bound
    if symbol in bound:
        return bound[symbol]
    production = rng.choice(GRAMMARS[language][symbol])
    text = _SLOT.sub(lambda slot: generate(slot[1], rng, language, bound), production)
    if symbol in KINDS:  # "the river" stays the same river until the scene ends
        bound[symbol] = text
    return text


def paragraph(rng: random.Random, language: str) -> list[str]:
    """Three to nine sentences of one scene: the same people, one season, two things that are found and described."""
    who = rng.choice(GRAMMARS[language]["who"])
    pronoun = PEOPLE[language][who]
    season = rng.choice((None, *SEASONS))
    bound = {"who": who, "Pron": pronoun, "pron": pronoun.lower()}
    bound["lead"] = generate(f"lead.{season}" if season and rng.random() < 0.6 else "lead.any", rng, language)
    first, second = rng.sample(KINDS, 2)

    def expand(symbol: str, thing: str | None = None) -> str:
        scene = bound | ({"thing": generate(f"{thing}.np", rng, language, bound)} if thing else {})
        return generate(symbol, rng, language, scene)

    sentences = [expand("open", first)]
    if bound.get(first, "?") in sentences[0]:
        sentences += [expand(f"about.{first}") for _ in range(rng.randint(1, 2))]
    else:  # the opening described the air and the sky
        sentences.append(expand("weather.any"))
    sentences.append(expand(f"weather.{season}" if season and rng.random() < 0.6 else "weather.any"))
    if rng.random() < 0.6:
        sentences += [expand("again", second), expand(f"about.{second}")]
    sentences.append(expand("act"))
    if rng.random() < 0.6:
        sentences.append(expand("close"))
    return list(dict.fromkeys(sentences))  # without repeated sentences


def split_sentences(text: str) -> list[str]:
    """The complete sentences of `text`, stripped; an unfinished last one is left out."""
    return [sentence.strip() for sentence in re.findall(r"[^.。\n]+[.。]|[^.。\n]+(?=\n)", text) if sentence.strip()]


def is_well_formed(sentence: str, language: str | None = None) -> bool:
    """Whether the grammar of `language` (None: of either) derives `sentence`, including its final punctuation."""
    if language is None:
        return any(is_well_formed(sentence, name) for name in GRAMMARS)
    grammar = GRAMMARS[language]

    @functools.cache
    def ends(symbol: str, start: int) -> frozenset[int]:
        """All positions where a `symbol` that starts at `start` can end."""
        return frozenset(end for production in grammar[symbol] for end in match(production, start))

    def match(production: str, start: int) -> set[int]:
        positions = {start}
        for literal, symbol in zip(*[iter([*_SLOT.split(production), ""])] * 2, strict=True):
            positions = {position + len(literal) for position in positions if sentence.startswith(literal, position)}
            if symbol:
                positions = {end for position in positions for end in ends(symbol, position)}
        return positions

    return len(sentence) in ends("sentence", 0)
