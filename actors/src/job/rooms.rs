//! Which pipeline gets the next row, where a job has several: a sum over counts, no actor.

/// Rows that each replica of the pipeline has room for. Of rows that are offered and not yet completed a pipeline never has
/// more than its window.
#[derive(Debug, Clone)]
pub(crate) struct Rooms(Vec<Room>);

#[derive(Debug, Clone, Copy)]
enum Room {
    /// For so many more rows.
    For(usize),
    /// The replica has failed for good.
    Gone,
}

impl Rooms {
    /// Replicas with such windows, all empty.
    pub(crate) fn new(windows: impl IntoIterator<Item = usize>) -> Self {
        Rooms(windows.into_iter().map(Room::For).collect())
    }

    /// Takes room for a row from the replica that has most; of several from the first. Nothing where all are full.
    pub(crate) fn take(&mut self) -> Option<usize> {
        let open = self.0.iter().enumerate().filter_map(|(replica, room)| match room {
            Room::For(rows) if *rows > 0 => Some((replica, *rows)),
            Room::For(_) | Room::Gone => None,
        });
        // The last of equal maxima is the first replica.
        let (replica, rows) = open.rev().max_by_key(|(_, rows)| *rows)?;
        self.0[replica] = Room::For(rows - 1);
        Some(replica)
    }

    /// A row of this replica is completed.
    pub(crate) fn give_back(&mut self, replica: usize) {
        if let Room::For(rows) = &mut self.0[replica] {
            *rows += 1;
        }
    }

    /// This replica takes no rows any more; whether any other does.
    pub(crate) fn close(&mut self, replica: usize) -> bool {
        self.0[replica] = Room::Gone;
        self.0.iter().any(|room| matches!(room, Room::For(_)))
    }

    /// Whether there is another replica that could take a row over.
    pub(crate) fn are_several(&self) -> bool {
        self.0.iter().filter(|room| matches!(room, Room::For(_))).count() > 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_where_most_room_is() {
        let mut rooms = Rooms::new([2, 3]);
        let taken: Vec<_> = (0..6).map(|_| rooms.take()).collect();
        assert_eq!(taken, [Some(1), Some(0), Some(1), Some(0), Some(1), None]);
        rooms.give_back(0);
        assert_eq!((rooms.take(), rooms.take()), (Some(0), None));
    }

    #[test]
    fn a_replica_that_is_gone_gets_no_row_and_its_room_does_not_come_back() {
        let mut rooms = Rooms::new([1, 1]);
        assert!(rooms.are_several());
        assert_eq!(rooms.take(), Some(0));
        assert!(rooms.close(0), "the other is there");
        rooms.give_back(0);
        assert_eq!((rooms.take(), rooms.take(), rooms.are_several()), (Some(1), None, false));
        assert!(!rooms.close(1));
    }
}
