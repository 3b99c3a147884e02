//! What pictures are drawn on: bars and outlines with tooltips, texts, lines and legends, in pixels from the top left.

use svg::Document;
use svg::node::element::{Definitions, Group, Line, Path, Pattern, Rectangle, Text, Title};

/// Fonts that systems have; the last is the system's own choice.
const FONTS: &str = "Helvetica, Arial, 'Liberation Sans', sans-serif";
/// Of texts that matter most.
pub(crate) const INK: &str = "#1f2933";
/// Of everything that only explains.
const PALE_INK: &str = "#52606d";
/// A character's width over the size of its font, on average in a wide one.
const CHARACTER: f64 = 0.6;
/// What parts of something shared are filled with, over their colour.
pub(crate) const HATCH: &str = "url(#hatch)";

/// Titles.
pub(crate) const TITLE: Font = Font { size: 22.0, colour: INK, is_bold: true, anchor: "start" };
/// Names of rows and columns.
pub(crate) const NAME: Font = Font { size: 13.0, colour: INK, is_bold: true, anchor: "start" };
/// Figures.
pub(crate) const FIGURE: Font = Font { size: 13.0, colour: INK, is_bold: false, anchor: "start" };
/// What explains.
pub(crate) const NOTE: Font = Font { size: 12.0, colour: PALE_INK, is_bold: false, anchor: "start" };
/// What explains in little room.
pub(crate) const SMALL: Font = Font { size: 10.5, colour: PALE_INK, is_bold: false, anchor: "start" };

/// How a text looks, and on which of its ends its place is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Font {
    pub(crate) size: f64,
    pub(crate) colour: &'static str,
    pub(crate) is_bold: bool,
    pub(crate) anchor: &'static str,
}

/// A rectangle of the page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Area {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) width: f64,
    pub(crate) height: f64,
}

/// A filled rectangle.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bar {
    pub(crate) area: Area,
    pub(crate) fill: &'static str,
}

/// Anything whose outline is a path in SVG's own words; without a stroke it is filled, with one it is a line.
#[derive(Debug)]
pub(crate) struct Shape {
    pub(crate) outline: String,
    pub(crate) name: &'static str,
    pub(crate) colour: &'static str,
    pub(crate) stroke: Option<f64>,
}

/// A picture under way.
#[derive(Debug)]
pub(crate) struct Canvas {
    width: f64,
    drawn: Group,
    title: String,
}

impl Font {
    /// The text ends at its place.
    pub(crate) fn to_the_left(self) -> Self {
        Font { anchor: "end", ..self }
    }

    /// The text has its middle at its place.
    pub(crate) fn centred(self) -> Self {
        Font { anchor: "middle", ..self }
    }

    /// A smaller size, where a text would be wider than so many pixels.
    pub(crate) fn within(self, text: &str, width: f64) -> Self {
        Font { size: self.size * (width / self.width(text)).min(1.0), ..self }
    }

    /// How wide a text is at most, near enough to place what follows it.
    pub(crate) fn width(self, text: &str) -> f64 {
        text.chars().count() as f64 * self.size * CHARACTER
    }
}

impl Area {
    /// The horizontal middle.
    pub(crate) fn middle(self) -> f64 {
        self.x + self.width / 2.0
    }
}

impl Canvas {
    /// An empty page; its title is what a screen reader says.
    pub(crate) fn new(width: f64, title: &str) -> Self {
        Canvas { width, drawn: Group::new(), title: title.to_owned() }
    }

    /// Bars that are one thing: they share a tooltip, and an attribute by which programs find them.
    pub(crate) fn bars(&mut self, mark: (&str, String), tooltip: &str, bars: &[Bar]) {
        let mut group = Group::new().set(mark.0, mark.1).add(Title::new(tooltip));
        for bar in bars {
            group = group.add(rectangle(bar.area).set("fill", bar.fill));
        }
        self.add(group);
    }

    /// Shapes that are one thing, as bars may be. Each has its name as `data-part`.
    pub(crate) fn shapes(&mut self, mark: (&str, String), tooltip: &str, shapes: &[Shape]) {
        let mut group = Group::new().set(mark.0, mark.1).add(Title::new(tooltip));
        for Shape { outline, name, colour, stroke } in shapes {
            let path = Path::new().set("data-part", *name).set("d", outline.as_str());
            group = group.add(match stroke {
                Some(width) => path.set("fill", "none").set("stroke", *colour).set("stroke-width", *width),
                None => path.set("fill", *colour),
            });
        }
        self.add(group);
    }

    /// A bar of no meaning of its own.
    pub(crate) fn bar(&mut self, bar: Bar) {
        self.add(rectangle(bar.area).set("fill", bar.fill));
    }

    /// The outline of a bar.
    pub(crate) fn frame(&mut self, area: Area, colour: &str, width: f64) {
        let frame = rectangle(area).set("fill", "none").set("stroke", colour).set("stroke-width", width);
        self.add(frame);
    }

    /// A text with its baseline at `y`.
    pub(crate) fn text(&mut self, x: f64, y: f64, font: Font, text: &str) {
        let mut node = Text::new(text).set("x", pixels(x)).set("y", pixels(y));
        node = node.set("font-size", pixels(font.size)).set("fill", font.colour);
        if font.anchor != "start" {
            node = node.set("text-anchor", font.anchor);
        }
        if font.is_bold {
            node = node.set("font-weight", "bold");
        }
        self.add(node);
    }

    /// A thin line.
    pub(crate) fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str) {
        self.add(line(from, to, colour));
    }

    /// A dashed line.
    pub(crate) fn dashes(&mut self, from: (f64, f64), to: (f64, f64), colour: &str) {
        self.add(line(from, to, colour).set("stroke-dasharray", "5 4"));
    }

    /// What colours mean, in rows from `start` on; boxes stand on the baseline. Returns the last baseline.
    pub(crate) fn legend<'a>(
        &mut self,
        start: f64,
        y: f64,
        font: Font,
        entries: impl IntoIterator<Item = (&'static str, &'a str)>,
    ) -> f64 {
        let (mut x, mut y) = (start, y);
        for (fill, name) in entries {
            let width = font.size + 7.0 + font.width(name);
            if x + width > self.width && x > start {
                (x, y) = (start, y + font.size * 1.7);
            }
            let area = Area { x, y: y - font.size + 1.0, width: font.size + 2.0, height: font.size };
            if fill == HATCH {
                self.bar(Bar { area, fill: "#9aa5b1" });
            }
            self.bar(Bar { area, fill });
            self.frame(area, "#9aa5b1", 0.5);
            self.text(x + font.size + 7.0, y, font, name);
            x += width + 12.0;
        }
        y
    }

    /// The text of the whole picture.
    pub(crate) fn finish(self, height: f64) -> String {
        let page = Area { x: 0.0, y: 0.0, width: self.width, height };
        let document = Document::new()
            .set("viewBox", (0, 0, pixels(self.width), pixels(height)))
            .set("font-family", FONTS)
            .set("role", "img")
            .add(Title::new(self.title))
            .add(Definitions::new().add(hatch()))
            .add(rectangle(page).set("fill", "#ffffff"))
            .add(self.drawn);
        format!("{document}\n")
    }

    fn add(&mut self, node: impl Into<Box<dyn svg::Node>>) {
        svg::Node::append(&mut self.drawn, node);
    }
}

/// The distance of marks on an axis: 1, 2 or 5 times a power of ten, so that at most `marks` fit into `most`.
pub(crate) fn step(most: f64, marks: f64) -> f64 {
    let mut power = 1.0;
    while power * marks > most {
        power /= 10.0;
    }
    while power * marks * 10.0 < most {
        power *= 10.0;
    }
    let wide_enough = |step: &f64| most / step <= marks;
    [power, 2.0 * power, 5.0 * power].into_iter().find(wide_enough).unwrap_or(10.0 * power)
}

/// Hundredths of a pixel are as fine as anything is drawn.
fn pixels(length: f64) -> f64 {
    (length * 100.0).round() / 100.0
}

fn rectangle(area: Area) -> Rectangle {
    Rectangle::new()
        .set("x", pixels(area.x))
        .set("y", pixels(area.y))
        .set("width", pixels(area.width))
        .set("height", pixels(area.height))
}

fn line(from: (f64, f64), to: (f64, f64), colour: &str) -> Line {
    let line = Line::new().set("x1", pixels(from.0)).set("y1", pixels(from.1));
    line.set("x2", pixels(to.0)).set("y2", pixels(to.1)).set("stroke", colour)
}

fn hatch() -> Pattern {
    let stripe = Path::new().set("d", "M0 6 L6 0 M-1 1 L1 -1 M5 7 L7 5").set("stroke", "#ffffff");
    Pattern::new()
        .set("id", "hatch")
        .set("width", 6)
        .set("height", 6)
        .set("patternUnits", "userSpaceOnUse")
        .add(stripe.set("stroke-width", 1.6).set("stroke-opacity", 0.6))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_stand_at_round_numbers_and_not_too_many() {
        assert_eq!([step(162.0, 20.0), step(12.0, 20.0), step(12.0, 12.0)], [10.0, 1.0, 1.0]);
        assert_eq!(step(20_937_981_952.0, 10.0), 5e9);
        for most in [0.003, 0.7, 1.0, 33.0, 1e12] {
            let marks = most / step(most, 8.0);
            assert!((1.5..=8.0).contains(&marks), "{marks} marks within {most}");
        }
    }

    #[test]
    fn texts_are_escaped() {
        let mut canvas = Canvas::new(100.0, "a < b");
        canvas.text(0.0, 0.0, NOTE, "<script>&");
        canvas.bars(("data-name", "\"'".to_owned()), "x > y", &[]);
        let svg = canvas.finish(50.0);
        let document = roxmltree::Document::parse(&svg).expect("XML");
        let texts: Vec<&str> = document.descendants().filter_map(|node| node.text()).map(str::trim).collect();
        assert!(["a < b", "<script>&", "x > y"].iter().all(|text| texts.contains(text)), "{svg}");
        assert!(document.descendants().any(|node| node.attribute("data-name") == Some("\"'")), "{svg}");
    }
}
