//! One plot as an inline SVG: a line for each series, with the range of its samples behind it.

use std::fmt::Write;

use crate::report::number;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 32.0;
const BOTTOM: f64 = 44.0;
/// Lines of a grid over the height.
const TICKS: u32 = 5;
/// Colours that can be told apart, by people who see red and green alike too.
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000",
];

/// One measured point.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Point {
    /// What was varied: bytes of a block.
    pub(crate) x: f64,
    /// The median.
    pub(crate) y: f64,
    /// The smallest.
    pub(crate) min: f64,
    /// The largest.
    pub(crate) max: f64,
}

/// The points of one subject, by growing `x`.
#[derive(Clone, Debug)]
pub(crate) struct Series<'a> {
    /// Who.
    pub(crate) name: &'a str,
    pub(crate) points: Vec<Point>,
}

/// What is drawn.
#[derive(Clone, Debug)]
pub(crate) struct Plot<'a> {
    pub(crate) title: String,
    /// What the height means.
    pub(crate) unit: String,
    /// Whether the height counts powers instead of steps.
    pub(crate) is_logarithmic: bool,
    pub(crate) series: Vec<Series<'a>>,
}

/// From values to places on the page.
struct Scale {
    from: f64,
    to: f64,
    is_logarithmic: bool,
}

impl Scale {
    fn share(&self, value: f64) -> f64 {
        let place = |value: f64| {
            if self.is_logarithmic {
                value.max(f64::MIN_POSITIVE).ln()
            } else {
                value
            }
        };
        let width = place(self.to) - place(self.from);
        if width == 0.0 {
            return 0.5;
        }
        ((place(value) - place(self.from)) / width).clamp(0.0, 1.0)
    }

    fn value(&self, share: f64) -> f64 {
        if self.is_logarithmic {
            self.from * (self.to / self.from).powf(share)
        } else {
            self.from + (self.to - self.from) * share
        }
    }
}

impl Plot<'_> {
    fn points(&self) -> impl Iterator<Item = &Point> {
        self.series.iter().flat_map(|series| &series.points)
    }

    fn scales(&self) -> (Scale, Scale) {
        let ends = |values: &mut dyn Iterator<Item = f64>| {
            values.fold(
                (f64::INFINITY, f64::NEG_INFINITY),
                |(least, most), value| (least.min(value), most.max(value)),
            )
        };
        let (from, to) = ends(&mut self.points().map(|point| point.x));
        let x = Scale {
            from,
            to,
            is_logarithmic: true,
        };
        let (least, _) = ends(&mut self.points().map(|point| point.min));
        let (_, most) = ends(&mut self.points().map(|point| point.max));
        let is_logarithmic = self.is_logarithmic && least > 0.0;
        let from = if is_logarithmic {
            least / 1.2
        } else {
            least.min(0.0)
        };
        let to = if most > from { most * 1.05 } else { from + 1.0 };
        let y = Scale {
            from,
            to,
            is_logarithmic,
        };
        (x, y)
    }

    /// The picture; nothing without points.
    pub(crate) fn svg(&self) -> String {
        if self.points().next().is_none() {
            return String::new();
        }
        let (x, y) = self.scales();
        let left = |value: f64| LEFT + x.share(value) * (WIDTH - LEFT - RIGHT);
        let top = |value: f64| HEIGHT - BOTTOM - y.share(value) * (HEIGHT - TOP - BOTTOM);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\"><text class=\"title\" x=\"{LEFT}\" y=\"18\">{}</text>\n",
            escaped(&self.title)
        );
        self.grid(&mut svg, &y, &left, &top);
        for (position, series) in self.series.iter().enumerate() {
            let colour = COLOURS[position % COLOURS.len()];
            draw(&mut svg, series, colour, &left, &top);
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn grid(
        &self,
        svg: &mut String,
        y: &Scale,
        left: &dyn Fn(f64) -> f64,
        top: &dyn Fn(f64) -> f64,
    ) {
        let end = WIDTH - RIGHT;
        for tick in 0..=TICKS {
            let value = y.value(f64::from(tick) / f64::from(TICKS));
            let (place, label) = (top(value), number(value));
            put(
                svg,
                format_args!(
                    "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{end}\" y1=\"{place:.1}\" y2=\"{place:.1}\"/>\
                     <text class=\"y\" x=\"{:.1}\" y=\"{:.1}\">{label}</text>\n",
                    LEFT - 6.0,
                    place + 4.0
                ),
            );
        }
        let mut sizes: Vec<f64> = self.points().map(|point| point.x).collect();
        sizes.sort_by(f64::total_cmp);
        sizes.dedup();
        // More labels than this lie on each other.
        let step = sizes.len().div_ceil(10).max(1);
        for size in sizes.iter().step_by(step) {
            put(
                svg,
                format_args!(
                    "<text class=\"x\" x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
                    left(*size),
                    HEIGHT - BOTTOM + 16.0,
                    size_label(*size)
                ),
            );
        }
        put(
            svg,
            format_args!(
                "<text class=\"x\" x=\"{:.1}\" y=\"{:.1}\">bytes of a block · {}</text>\n",
                f64::midpoint(LEFT, end),
                HEIGHT - 6.0,
                escaped(&self.unit)
            ),
        );
    }
}

fn draw(
    svg: &mut String,
    series: &Series<'_>,
    colour: &str,
    left: &dyn Fn(f64) -> f64,
    top: &dyn Fn(f64) -> f64,
) {
    let place = |x: f64, y: f64| format!("{:.1},{:.1} ", left(x), top(y));
    let upper = series.points.iter().map(|point| place(point.x, point.max));
    let lower = series
        .points
        .iter()
        .rev()
        .map(|point| place(point.x, point.min));
    let band: String = upper.chain(lower).collect();
    let line: String = series
        .points
        .iter()
        .map(|point| place(point.x, point.y))
        .collect();
    put(
        svg,
        format_args!(
            "<polygon class=\"band\" fill=\"{colour}\" points=\"{}\"/><polyline stroke=\"{colour}\" points=\"{}\"/>\n",
            band.trim_end(),
            line.trim_end()
        ),
    );
    for point in &series.points {
        put(
            svg,
            format_args!(
                "<circle fill=\"{colour}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>{} {}: {} ({}–{})</title></circle>\n",
                left(point.x),
                top(point.y),
                escaped(series.name),
                size_label(point.x),
                number(point.y),
                number(point.min),
                number(point.max)
            ),
        );
    }
}

/// The names beside the colours of their lines, in the order of [`Plot::series`].
pub(crate) fn legend(names: &[&str]) -> String {
    let entry = |(position, name): (usize, &&str)| {
        let colour = COLOURS[position % COLOURS.len()];
        format!(
            "<span><i style=\"background:{colour}\"></i>{}</span>",
            escaped(name)
        )
    };
    let entries: String = names.iter().enumerate().map(entry).collect();
    format!("<p class=\"legend\">{entries}</p>\n")
}

/// Text as it may stand in a page.
pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn size_label(bytes: f64) -> String {
    for (unit, letter) in [(30, "G"), (20, "M"), (10, "K")] {
        let unit = f64::from(1_u32 << unit);
        if bytes >= unit && bytes % unit == 0.0 {
            return format!("{}{letter}", bytes / unit);
        }
    }
    format!("{bytes}")
}

/// Appends; a string takes everything.
fn put(text: &mut String, what: std::fmt::Arguments<'_>) {
    let _ = text.write_fmt(what);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(is_logarithmic: bool, values: &[(f64, f64)]) -> Plot<'static> {
        let points = values.iter().map(|&(x, y)| Point {
            x,
            y,
            min: y / 2.0,
            max: y,
        });
        Plot {
            title: "a < b".to_owned(),
            unit: "µs".to_owned(),
            is_logarithmic,
            series: vec![Series {
                name: "kvfabric",
                points: points.collect(),
            }],
        }
    }

    /// The places of the points' circles.
    fn circles(svg: &str) -> Vec<(f64, f64)> {
        let value = |text: &str, name: &str| -> f64 {
            let rest = text.split_once(name).unwrap().1;
            rest.split('"').next().unwrap().parse().unwrap()
        };
        let tags = svg.split("<circle").skip(1);
        tags.map(|tag| (value(tag, "cx=\""), value(tag, "cy=\"")))
            .collect()
    }

    /// Looks where the points lie: the first size on the left, the last on the right, larger values higher.
    #[test]
    fn points_lie_where_their_values_are() {
        for is_logarithmic in [false, true] {
            let svg = plot(
                is_logarithmic,
                &[(4096.0, 1.0), (16384.0, 4.0), (65536.0, 2.0)],
            )
            .svg();
            let places = circles(&svg);
            assert_eq!(places.len(), 3, "{svg}");
            assert_eq!((places[0].0, places[2].0), (LEFT, WIDTH - RIGHT));
            assert_eq!(places[1].0, f64::midpoint(LEFT, WIDTH - RIGHT));
            assert!(
                places[1].1 < places[2].1 && places[2].1 < places[0].1,
                "{places:?}"
            );
            assert!(svg.contains("a &lt; b") && svg.contains(">4K<") && svg.contains(">64K<"));
        }
    }

    /// One point, points of one height, and none.
    #[test]
    fn what_has_no_extent_is_drawn_all_the_same() {
        assert_eq!(circles(&plot(true, &[(4096.0, 1.0)]).svg()).len(), 1);
        let flat = plot(false, &[(1.0, 0.0), (2.0, 0.0)]).svg();
        assert!(
            circles(&flat).iter().all(|place| place.1.is_finite()),
            "{flat}"
        );
        assert_eq!(plot(true, &[]).svg(), "");
    }
}
