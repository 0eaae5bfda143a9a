"""The words that `questions.py` fills its requests with; every fourth of a list is kept for the test."""

DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

CITIES = (
    "Oslo", "Paris", "Lima", "Cairo", "Rome", "Berlin", "Quito", "Dublin", "Tokyo", "Madrid", "Delhi", "Vienna",
    "Seoul", "Lisbon", "Boston", "Prague", "Athens", "Zurich", "Nairobi", "Warsaw",
)  # fmt: skip
NAMES = (
    "Anna", "Omar", "Lucy", "Ivan", "Maria", "Peter", "Chen", "Fatima", "David", "Elena", "Hugo", "Nina", "Paul",
    "Sara", "Tom", "Yuki", "Carlos", "Greta", "Jamal", "Rosa",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "grey", "brown", "pink", "orange", "purple", "silver")
# (table, a column of text, what is in it, a column of numbers)
TABLES = (
    ("orders", "city", CITIES, "amount"), ("employees", "office", CITIES, "salary"),
    ("books", "author", NAMES, "pages"), ("flights", "origin", CITIES, "duration"),
    ("cars", "colour", COLOURS, "price"), ("students", "name", NAMES, "score"),
    ("houses", "city", CITIES, "rooms"), ("matches", "player", NAMES, "points"),
    ("shirts", "colour", COLOURS, "size"), ("invoices", "customer", NAMES, "total"),
    ("hotels", "city", CITIES, "stars"), ("bikes", "colour", COLOURS, "weight"),
    ("trips", "driver", NAMES, "distance"), ("shops", "city", CITIES, "revenue"),
    ("lamps", "colour", COLOURS, "watts"), ("concerts", "singer", NAMES, "visitors"),
)  # fmt: skip

FOLDERS = (
    "src", "docs", "build", "photos", "data", "backup", "tests", "music", "logs", "config", "assets", "reports",
    "downloads", "scripts", "notes", "projects",
)  # fmt: skip
ENDINGS = (
    "log",
    "txt",
    "py",
    "csv",
    "tmp",
    "md",
    "html",
    "json",
    "jpg",
    "pdf",
    "bak",
    "xml",
    "conf",
    "cpp",
    "sh",
    "yml",
)
STEMS = (
    "notes", "app", "server", "report", "users", "old", "main", "results", "index", "todo", "summary", "prices",
    "letters", "access", "draft", "archive",
)  # fmt: skip
WORDS = (
    "TODO", "error", "password", "warning", "foo", "debug", "import", "timeout", "alpha", "failed", "user", "token",
    "main", "cache", "retry", "bar",
)  # fmt: skip

LETTERS = ("x", "a", "b", "y", "z", "c", "p", "u", "q", "s", "t", "v")
GREEK = ("alpha", "beta", "gamma", "lambda", "theta", "mu", "pi", "sigma", "phi", "omega", "rho", "delta")

PLACES = (
    "Luigi's", "the Golden Dragon", "Chez Marie", "Blue Bay", "Taj Palace", "the Old Mill", "Sakura", "El Toro",
    "the Green Door", "Casa Lupe", "Harbour House", "Mama Rosa", "the Lighthouse", "Bistro Nord", "Saffron",
    "the Red Lion", "Olive Garden", "Little Hanoi", "the Copper Pot", "Villa Verde",
)  # fmt: skip

THINGS = (
    "lamp", "jacket", "phone", "chair", "printer", "watch", "kettle", "camera", "tablet", "backpack", "mixer",
    "monitor", "desk", "radio", "helmet", "keyboard",
)  # fmt: skip
MESSAGES = {
    "billing": (
        "I was charged twice for the {thing}.", "The invoice for my {thing} shows a wrong amount.",
        "Can I pay for the {thing} by card instead?", "Why is there an extra fee on my bill of {day}?",
        "My payment on {day} was declined.", "Please send me a receipt for the {thing}.",
        "The discount was not taken off the price of the {thing}.", "You took the money for the {thing} two times.",
    ),
    "delivery": (
        "My {thing} was due on {day} and has not come.", "Where is my parcel with the {thing}?",
        "Can you bring the {thing} to another address?", "The tracking of my {thing} has not moved since {day}.",
        "The driver left the {thing} in the rain.", "When will the {thing} arrive?",
        "Nobody rang on {day}, and the {thing} is at the depot.", "The courier never showed up with the {thing}.",
    ),
    "returns": (
        "The {thing} is the wrong colour and I want to send it back.", "How do I return the {thing}?",
        "I changed my mind about the {thing} and want my money back.", "Can I swap the {thing} for a larger one?",
        "I would like a return label for the {thing}.", "The {thing} does not suit me, please take it back.",
        "Until when can I exchange the {thing} from {day}?",
        "I do not want to keep the {thing}, how do I send it back?",
    ),
    "account": (
        "I forgot my password.", "I cannot log in since {day}.",
        "Please change the email address of my profile.", "How do I delete my account?",
        "My user name is not accepted.", "The code for signing in never reaches me.",
        "I want to close my profile.", "Since {day} it says that my login is locked.",
    ),
    "technical": (
        "The {thing} does not turn on.", "My {thing} makes a strange noise.",
        "The screen of the {thing} stays black.", "The {thing} stopped working on {day}.",
        "How do I reset the {thing}?", "The {thing} gets very hot.",
        "The battery of the {thing} is empty after an hour.", "The {thing} shows an error and beeps.",
    ),
}  # fmt: skip
