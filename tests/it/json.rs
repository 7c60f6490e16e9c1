//! A reader of JSON that shares nothing with the writer that is tested.

/// A JSON value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Number(u64),
    Text(String),
    Items(Vec<Json>),
    Fields(Vec<(String, Json)>),
}

impl Json {
    /// Reads a line that is one value. Panics if it is not.
    #[must_use]
    pub(crate) fn parse(line: &str) -> Self {
        let mut reader = Reader { text: line, rest: line };
        let value = reader.value();
        assert!(reader.rest.trim().is_empty(), "more than one value: {line}");
        value
    }

    /// A field that must be there.
    #[must_use]
    pub(crate) fn get(&self, name: &str) -> &Json {
        let Json::Fields(fields) = self else { panic!("no object with {name}: {self:?}") };
        let found = fields.iter().find(|(key, _)| key == name);
        found.map_or_else(|| panic!("no {name}: {self:?}"), |(_, value)| value)
    }

    /// A string's characters; nothing for null.
    #[must_use]
    pub(crate) fn text(&self) -> &str {
        match self {
            Json::Text(text) => text,
            Json::Null => "",
            other => panic!("no string: {other:?}"),
        }
    }

    /// A number that is not negative and whole, as all of ours are.
    #[must_use]
    pub(crate) fn number(&self) -> u64 {
        let Json::Number(number) = self else { panic!("no number: {self:?}") };
        *number
    }

    /// Whether it is `true`.
    #[must_use]
    pub(crate) fn is_true(&self) -> bool {
        *self == Json::Bool(true)
    }

    /// An array's items.
    #[must_use]
    pub(crate) fn items(&self) -> &[Json] {
        let Json::Items(items) = self else { panic!("no array: {self:?}") };
        items
    }
}

struct Reader<'a> {
    text: &'a str,
    rest: &'a str,
}

impl Reader<'_> {
    fn value(&mut self) -> Json {
        self.rest = self.rest.trim_start();
        for (word, value) in [("null", Json::Null), ("true", Json::Bool(true)), ("false", Json::Bool(false))] {
            if let Some(rest) = self.rest.strip_prefix(word) {
                self.rest = rest;
                return value;
            }
        }
        match self.rest.chars().next() {
            Some('"') => Json::Text(self.string()),
            Some('[') => Json::Items(self.list(']', Self::value)),
            Some('{') => Json::Fields(self.list('}', |reader| {
                let key = reader.string();
                reader.expect(':');
                (key, reader.value())
            })),
            _ => {
                let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
                let (digits, rest) = self.rest.split_at(end);
                self.rest = rest;
                Json::Number(digits.parse().unwrap_or_else(|_| panic!("no value: {}", self.text)))
            }
        }
    }

    fn list<T>(&mut self, close: char, item: impl Fn(&mut Self) -> T) -> Vec<T> {
        let mut items = Vec::new();
        self.rest = self.rest[1..].trim_start();
        while !self.rest.starts_with(close) {
            if !items.is_empty() {
                self.expect(',');
            }
            items.push(item(self));
            self.rest = self.rest.trim_start();
        }
        self.expect(close);
        items
    }

    fn string(&mut self) -> String {
        self.expect('"');
        let mut out = String::new();
        loop {
            let c = self.next();
            match c {
                '"' => return out,
                '\\' => match self.next() {
                    'n' => out.push('\n'),
                    't' => out.push('\t'),
                    'r' => out.push('\r'),
                    'u' => {
                        let digits: String = (0..4).map(|_| self.next()).collect();
                        let number = u32::from_str_radix(&digits, 16).expect("four digits");
                        out.push(char::from_u32(number).expect("a character"));
                    }
                    c @ ('"' | '\\' | '/') => out.push(c),
                    other => panic!("\\{other} in {}", self.text),
                },
                c => {
                    assert!(!c.is_control(), "a bare control character in {:?}", self.text);
                    out.push(c);
                }
            }
        }
    }

    fn next(&mut self) -> char {
        let c = self.rest.chars().next().unwrap_or_else(|| panic!("cut off: {}", self.text));
        self.rest = &self.rest[c.len_utf8()..];
        c
    }

    fn expect(&mut self, c: char) {
        self.rest = self.rest.trim_start();
        assert_eq!(self.next(), c, "in {}", self.text);
    }
}
