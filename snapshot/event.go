package snapshot

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// An Event tells that a job ended. The functions that follow make one of each
// kind: start is when the job began, and failed, unless nil, why it failed. What
// a job that failed early does not know yet is left zero.
type Event = manifest.Event

// SnapshotCreated is createSnapshot: id was made, of a volume or ("") an image.
func (s *Store) SnapshotCreated(id manifest.SnapshotID, of manifest.VolumeID, start time.Time, failed error) Event {
	e := s.snapshotEvent(manifest.EventCreateSnapshot, id, start, failed)
	e.Detail.Source = manifest.VolumeARN(s.region(), of)
	return e
}

// SnapshotDeleted is deleteSnapshot.
func (s *Store) SnapshotDeleted(id manifest.SnapshotID, start time.Time, failed error) Event {
	return s.snapshotEvent(manifest.EventDeleteSnapshot, id, start, failed)
}

// SnapshotCopied is copySnapshot, for the store that was copied to: id is the
// copy there, and source what it was copied of in the store from.
func (s *Store) SnapshotCopied(id, source manifest.SnapshotID, from *Store, incremental bool, start time.Time, failed error) Event {
	e := s.snapshotEvent(manifest.EventCopySnapshot, id, start, failed)
	e.Detail.Source = manifest.SnapshotARN(from.region(), source)
	if failed == nil {
		e.Detail.Incremental = fmt.Sprint(incremental)
	}
	return e
}

// SnapshotShared is shareSnapshot: id was shared with an account by another one,
// "" if that is unknown. As EBS has it, the event is the recipient's.
func (s *Store) SnapshotShared(id manifest.SnapshotID, with, by string, start time.Time, failed error) Event {
	e := s.snapshotEvent(manifest.EventShareSnapshot, id, start, failed)
	e.Account, e.Detail.Source = with, by
	return e
}

// A SetMember is one snapshot of a set; the id is zero if it never began.
type SetMember struct {
	Snapshot manifest.SnapshotID
	Volume   manifest.VolumeID
}

// SnapshotsCreated is createSnapshots: a set of volumes at one moment. All of
// its members were completed, or none. Only the first
// [manifest.MaxEventSnapshots] are named.
func (s *Store) SnapshotsCreated(members []SetMember, start time.Time, failed error) Event {
	e := s.newEvent(manifest.MultiVolumeNotification, manifest.EventCreateSnapshots, failed)
	e.Detail.Start, e.Detail.End = start.UTC().Truncate(time.Millisecond), now()
	status := Completed
	if failed != nil {
		status = Aborted
	}
	for _, m := range members[:min(len(members), manifest.MaxEventSnapshots)] {
		named := manifest.EventSnapshot{Source: manifest.VolumeARN(s.region(), m.Volume), Status: string(status)}
		if !m.Snapshot.IsZero() {
			named.SnapshotID = manifest.SnapshotARN(s.region(), m.Snapshot)
			e.Resources = append(e.Resources, named.SnapshotID)
		}
		e.Detail.Snapshots = append(e.Detail.Snapshots, named)
	}
	return e
}

// VolumeCreated is createVolume. As EBS has it, the result is "available" or
// "failed", and there are no times but the event's own.
func (s *Store) VolumeCreated(id manifest.VolumeID, failed error) Event {
	e := s.volumeEvent(manifest.EventCreateVolume, id, failed)
	if failed == nil {
		e.Detail.Result = manifest.ResultAvailable
	}
	return e
}

// VolumeInitialized is initializeVolume: all that the volume's snapshot holds is
// on its host.
func (s *Store) VolumeInitialized(id manifest.VolumeID, failed error) Event {
	e := s.volumeEvent(manifest.EventInitializeVolume, id, failed)
	e.Detail.Completion = now()
	return e
}

func (s *Store) snapshotEvent(event string, id manifest.SnapshotID, start time.Time, failed error) Event {
	e := s.newEvent(manifest.SnapshotNotification, event, failed)
	if !id.IsZero() {
		e.Detail.SnapshotID = manifest.SnapshotARN(s.region(), id)
		e.Resources = []string{e.Detail.SnapshotID}
	}
	e.Detail.Start, e.Detail.End = start.UTC().Truncate(time.Millisecond), now()
	return e
}

func (s *Store) volumeEvent(event string, id manifest.VolumeID, failed error) Event {
	e := s.newEvent(manifest.VolumeNotification, event, failed)
	if id != "" {
		e.Resources = []string{manifest.VolumeARN(s.region(), id)}
	}
	return e
}

func (s *Store) newEvent(detailType, event string, failed error) Event {
	e := Event{
		Version: manifest.EventVersion, ID: manifest.NewEventID(), DetailType: detailType, Source: manifest.EventSource,
		Account: s.owner, Time: time.Now().UTC(), Region: s.region(), Resources: []string{},
		Detail: manifest.EventDetail{Event: event, Result: manifest.ResultSucceeded},
	}
	if failed != nil {
		e.Detail.Result, e.Detail.Cause = manifest.ResultFailed, manifest.EventText(failed.Error())
	}
	return e
}

// region is the one that the store's URL names, or "".
func (s *Store) region() string {
	u, err := url.Parse(s.objects.String())
	if err != nil {
		return ""
	}
	return u.Query().Get("region")
}

// AppendEvent puts an event into the store, where [Store.Events] finds it.
func (s *Store) AppendEvent(ctx context.Context, e Event) error {
	data, err := e.Encode()
	if err == nil {
		_, err = s.objects.Put(ctx, e.Key(), data, blockstore.IfAbsent)
	}
	if errors.Is(err, blockstore.ErrExists) { // this one, and its reply was lost: nobody draws the same id
		return nil
	}
	if err != nil {
		return fmt.Errorf("store event %s: %w", e.Detail.Event, err)
	}
	return nil
}

// eventBatch is how many events are read ahead of what they are handed to.
const eventBatch = 256

// A HandleEvent takes events, one at a time and in the order of their times. Of
// one that cannot be read it is told why instead: damaged. An error of its own
// ends the reading and is returned.
type HandleEvent func(e Event, damaged error) error

// Events hands over the events of the store from a time on, by the clocks of the
// hosts that wrote them. It holds some hundred in memory, however many there are.
// Those removed meanwhile are passed over.
func (s *Store) Events(ctx context.Context, since time.Time, handle HandleEvent) error {
	return s.eventsAfter(ctx, manifest.EventKeysFrom(since), nil, func(_ string, e Event, damaged error) error {
		if errors.Is(damaged, blockstore.ErrNotExist) {
			return nil
		}
		return handle(e, damaged)
	})
}

// eventsAfter reads the events whose keys are greater than after and not to be
// skipped, and hands them over in the order of their keys. For those that were
// removed meanwhile damaged is blockstore.ErrNotExist.
func (s *Store) eventsAfter(ctx context.Context, after string, skip map[string]bool, handle func(key string, e Event, damaged error) error) error {
	batch := make([]string, 0, eventBatch)
	flush := func() error {
		err := s.readEvents(ctx, batch, handle)
		batch = batch[:0]
		return err
	}
	err := s.listEvents(ctx, after, func(info blockstore.Info) error {
		if skip[info.Key] {
			return nil
		}
		if batch = append(batch, info.Key); len(batch) < eventBatch {
			return nil
		}
		return flush()
	})
	if err != nil {
		return err
	}
	return flush()
}

// listEvents lists the events whose keys are greater than after. Other keys are
// nothing of lazyvol's.
func (s *Store) listEvents(ctx context.Context, after string, fn func(blockstore.Info) error) error {
	var fnErr error
	err := blockstore.ListAfter(ctx, s.objects, manifest.KindPrefix(manifest.KindEvents), after, func(info blockstore.Info) error {
		if _, _, err := manifest.ParseEventKey(info.Key); err != nil {
			return nil
		}
		fnErr = fn(info)
		return fnErr
	})
	if err != nil && fnErr == nil {
		err = fmt.Errorf("list events: %w", err)
	}
	return err
}

// readEvents reads some events at once and hands them over in order, up to the
// first that cannot be had at present.
func (s *Store) readEvents(ctx context.Context, keys []string, handle func(key string, e Event, damaged error) error) error {
	events, failed := make([]Event, len(keys)), make([]error, len(keys))
	g, gctx := newGroup(ctx)
	g.SetLimit(parallel)
	for i, key := range keys {
		g.Go(func() error {
			events[i], failed[i] = s.readEvent(gctx, key)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i, key := range keys {
		if failed[i] != nil && !isDamage(failed[i]) {
			return failed[i]
		}
		if err := handle(key, events[i], failed[i]); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) readEvent(ctx context.Context, key string) (Event, error) {
	data, _, err := s.objects.Get(ctx, key, manifest.MaxEventLength)
	if err != nil {
		return Event{}, fmt.Errorf("read an event: %w", err)
	}
	e, err := manifest.DecodeEvent(data)
	if err == nil && e.Key() != key {
		err = fmt.Errorf("it is that of %s: %w", e.Key(), manifest.ErrCorrupt)
	}
	if err != nil {
		return Event{}, fmt.Errorf("read %s: %w", key, err)
	}
	return e, nil
}

// eventAge is how long events are kept: as long as CloudTrail shows EBS's. It is
// measured by the store's clock.
const eventAge = 90 * 24 * time.Hour

// ExpireEvents removes events of more than 90 days, and returns how many there
// were and their bytes. Nothing depends on them.
func (s *Store) ExpireEvents(ctx context.Context) (removed int, bytes int64, err error) {
	var keys []string
	var size int64
	flush := func() error {
		if len(keys) == 0 {
			return nil
		}
		if err := s.objects.Delete(ctx, keys...); err != nil {
			return err
		}
		removed, bytes = removed+len(keys), bytes+size
		keys, size = keys[:0], 0
		return nil
	}
	err = s.listEvents(ctx, "", func(info blockstore.Info) error {
		if info.Age < eventAge {
			return nil
		}
		keys, size = append(keys, info.Key), size+info.Size
		if len(keys) < deleteBatch {
			return nil
		}
		return flush()
	})
	if err == nil {
		err = flush()
	}
	if err != nil {
		return removed, bytes, fmt.Errorf("remove old events: %w", err)
	}
	return removed, bytes, nil
}
