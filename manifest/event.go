package manifest

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// KindEvents are what happened, as EBS tells it on EventBridge.
const KindEvents = "events"

const (
	// EventVersion is the version of the envelope, and the only one that is read: EventBridge's.
	EventVersion = "0"

	// EventSource is the source of every event. EBS's is "aws.ec2", and rules that wait for that
	// must not take ours for it.
	EventSource = "lazyvol"

	// MaxEventLength bounds an encoded event, in bytes: what EventBridge takes in one entry.
	MaxEventLength = 256 << 10

	// MaxEventCause bounds the cause of a failure, in bytes.
	MaxEventCause = 1 << 10

	// MaxEventSnapshots bounds the members of a set, and the resources of an event.
	MaxEventSnapshots = 512

	maxEventText = 512 // of any other text, in bytes
)

// The types of events, as EBS names them.
const (
	SnapshotNotification    = "EBS Snapshot Notification"
	VolumeNotification      = "EBS Volume Notification"
	MultiVolumeNotification = "EBS Multi-Volume Snapshots Completion Status"
)

// The events.
const (
	EventCreateSnapshot   = "createSnapshot"
	EventCopySnapshot     = "copySnapshot"
	EventDeleteSnapshot   = "deleteSnapshot"
	EventShareSnapshot    = "shareSnapshot"
	EventCreateSnapshots  = "createSnapshots"
	EventCreateVolume     = "createVolume"
	EventInitializeVolume = "initializeVolume"
)

// The results of events. A volume that was created is available, as EBS says it.
const (
	ResultSucceeded = "succeeded"
	ResultAvailable = "available"
	ResultFailed    = "failed"
)

// An Event tells that a job ended: an EventBridge envelope. It is created once, and nothing depends
// on it.
type Event struct {
	Version    string      `json:"version"` // EventVersion
	ID         string      `json:"id"`      // see NewEventID
	DetailType string      `json:"detail-type"`
	Source     string      `json:"source"`
	Account    string      `json:"account"` // the owner of what it is about (see [Intent]), or whom that was shared with; may be empty
	Time       time.Time   `json:"time"`    // by the clock of the host
	Region     string      `json:"region"`  // the store's; may be empty
	Resources  []string    `json:"resources"`
	Detail     EventDetail `json:"detail"`
}

// EventDetail is what EBS tells of an event; which of the optional fields it has depends on Event.
type EventDetail struct {
	Event       string          `json:"event"`
	Result      string          `json:"result"`
	Cause       string          `json:"cause"` // of a failure; else empty
	RequestID   string          `json:"request-id"`
	SnapshotID  string          `json:"snapshot_id,omitempty"`
	Source      string          `json:"source,omitempty"` // what it was made of, or who shared it
	Start       time.Time       `json:"startTime,omitzero"`
	End         time.Time       `json:"endTime,omitzero"`
	Completion  time.Time       `json:"completionTime,omitzero"`
	Incremental string          `json:"incremental,omitempty"` // "true" or "false"
	Snapshots   []EventSnapshot `json:"snapshots,omitempty"`   // of a set
	Host        string          `json:"host,omitempty"`        // whose job it was, for people; EBS has no such field
}

// An EventSnapshot is one of a set of snapshots.
type EventSnapshot struct {
	SnapshotID string `json:"snapshot_id"`
	Source     string `json:"source,omitempty"`
	Status     string `json:"status"`
}

// NewEventID draws the id of an event: a random UUID (RFC 9562, version 4), as EventBridge's are.
func NewEventID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails: see crypto/rand
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func validEventID(s string) bool {
	digits := strings.ReplaceAll(s, "-", "")
	if len(digits) != 32 || !isHex(digits) {
		return false
	}
	return s == strings.Join([]string{digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]}, "-")
}

// The ARNs in events. EBS's samples have the region in one of two places; scripts look at what comes
// behind the slash.
const (
	snapshotARN = "arn:lazyvol:ec2::%s:snapshot/%s"
	volumeARN   = "arn:lazyvol:ec2::%s:volume/%s"
)

// SnapshotARN names a snapshot in an event.
func SnapshotARN(region string, id SnapshotID) string { return fmt.Sprintf(snapshotARN, region, id) }

// VolumeARN names a volume in an event; "" if there is none.
func VolumeARN(region string, id VolumeID) string {
	if id == "" {
		return ""
	}
	return fmt.Sprintf(volumeARN, region, id)
}

// eventTime is the time in an event's key: UTC, and of one width, so that keys list in the order of
// time.
const eventTime = "2006-01-02T15:04:05.000000000Z"

// EventKey is where an [Event] lies.
func EventKey(t time.Time, id string) string { return EventKeysFrom(t) + "-" + id }

// EventKeysFrom is less than the keys of all events from t on, and greater than those of all before.
func EventKeysFrom(t time.Time) string {
	return KindPrefix(KindEvents) + t.UTC().Format(eventTime)
}

// ParseEventKey is the inverse of [EventKey]. Its error wraps [ErrID].
func ParseEventKey(key string) (t time.Time, id string, err error) {
	name, ok := strings.CutPrefix(key, KindPrefix(KindEvents))
	if ok && len(name) > len(eventTime) {
		t, err = time.Parse(eventTime, name[:len(eventTime)])
		id = name[len(eventTime)+1:]
	}
	if err != nil || !validEventID(id) || key != EventKey(t, id) {
		return time.Time{}, "", fmt.Errorf("%w: key %q is not an event's", ErrID, key)
	}
	return t, id, nil
}

// Key is where the event lies.
func (e Event) Key() string { return EventKey(e.Time, e.ID) }

// Encode encodes an event. It is an error if it is not as docs/format.md specifies: what it returns
// can be decoded again.
func (e Event) Encode() ([]byte, error) {
	if err := e.validate(); err != nil {
		return nil, fmt.Errorf("encode event: %w", err)
	}
	data, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encode event: %w", err)
	}
	if len(data) > MaxEventLength {
		return nil, fmt.Errorf("encode event: %d bytes are more than %d", len(data), MaxEventLength)
	}
	return data, nil
}

// DecodeEvent decodes and validates an event. Fields it does not know are ignored. It allocates at
// most a small multiple of len(data), which may not exceed [MaxEventLength]. Its error wraps
// [ErrVersion] if the event is of another version, else [ErrCorrupt].
func DecodeEvent(data []byte) (Event, error) {
	const what = "event"
	if len(data) > MaxEventLength {
		return Event{}, corrupt(what, "%d bytes are more than %d", len(data), MaxEventLength)
	}
	var head struct {
		Version *string `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return Event{}, fmt.Errorf("%s: %w: %w", what, ErrCorrupt, err)
	}
	if head.Version == nil {
		return Event{}, corrupt(what, "no version")
	}
	if *head.Version != EventVersion {
		return Event{}, fmt.Errorf("%s: %w: version %.20q, and this build reads %q", what, ErrVersion, *head.Version, EventVersion)
	}
	var e Event
	if err := json.Unmarshal(data, &e); err != nil {
		return Event{}, fmt.Errorf("%s: %w: %w", what, ErrCorrupt, err)
	}
	if err := e.validate(); err != nil {
		return Event{}, fmt.Errorf("%s: %w: %w", what, ErrCorrupt, err)
	}
	return e, nil
}

// validate also sees to it that an event can be printed: there is no control character in it.
func (e Event) validate() error {
	if e.Version != EventVersion {
		return check(false, "version", e.Version)
	}
	d := e.Detail
	for field, text := range map[string]string{
		"detail-type": e.DetailType, "source": e.Source, "event": d.Event, "result": d.Result,
	} {
		if text == "" {
			return check(false, field, text)
		}
	}
	for field, text := range map[string]string{
		"detail-type": e.DetailType, "source": e.Source, "account": e.Account, "region": e.Region,
		"event": d.Event, "result": d.Result, "request id": d.RequestID, "snapshot": d.SnapshotID,
		"source of the detail": d.Source, "incremental": d.Incremental, "host": d.Host,
	} {
		if !printable(text, maxEventText) {
			return check(false, field, text)
		}
	}
	for _, resource := range e.Resources {
		if !printable(resource, maxEventText) {
			return check(false, "resource", resource)
		}
	}
	for _, s := range d.Snapshots {
		if !printable(s.SnapshotID, maxEventText) || !printable(s.Source, maxEventText) || !printable(s.Status, maxEventText) {
			return check(false, "snapshot of a set", s.SnapshotID)
		}
	}
	for field, t := range map[string]time.Time{"startTime": d.Start, "endTime": d.End, "completionTime": d.Completion} {
		if err := checkTime(field, t); err != nil && !t.IsZero() {
			return err
		}
	}
	switch {
	case !validEventID(e.ID):
		return check(false, "id", e.ID)
	case !printable(d.Cause, MaxEventCause):
		return check(false, "cause", d.Cause)
	case len(e.Resources) > MaxEventSnapshots:
		return check(false, "number of resources", len(e.Resources))
	case len(d.Snapshots) > MaxEventSnapshots:
		return check(false, "number of snapshots", len(d.Snapshots))
	}
	return checkTime("time", e.Time.UTC())
}

func printable(s string, most int) bool {
	return len(s) <= most && utf8.ValidString(s) && strings.IndexFunc(s, unicode.IsControl) < 0
}

// EventText makes a text fit to be the cause in an event: one line of at most [MaxEventCause] bytes.
func EventText(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "�"))
	if len(s) <= MaxEventCause {
		return s
	}
	const more = "…"
	return strings.ToValidUTF8(s[:MaxEventCause-len(more)], "") + more
}
