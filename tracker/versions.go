package tracker

import (
	"slices"
	"time"

	api "github.com/imagewolf/imagewolf/api/v1"
)

// Members may announce one segment by different hashes. Only one of them can be
// right, and nothing in the hashes says which. One version is current, by which the
// segment goes from member to member; what the others say is kept, so that it can
// take its place when those who brought the current one turn out to be wrong.
//
// A member that has the whole blob knows by its sha256 that its version is right. Its
// word counts as every other: one gets the author of another version named, two shut
// it out. Who only passed a version on is not to blame, nor who was deceived: a member
// that has bytes by hashes that were found wrong finds others by them, until it knows. It
// is told to throw them away once their author is shut out.

const (
	// maxVersions is how many versions of a segment are kept beside the current one.
	maxVersions = 4
	// maxKept is how many that hold a version are remembered while it is not current:
	// enough for it to spread from.
	maxKept = 4
	// maxTook is how many authors of former versions a member is known to have bytes by.
	maxTook = 4
)

// Why a member is shut out over hashes and pieces.
const (
	wrongPieces = "it sent pieces that do not have the hashes it announced"
	otherHashes = "it announced other hashes than those that have the whole blob"
	noSegment   = "it announced what is no segment of the blob"
)

// version is a segment by other hashes than the current ones.
type version struct {
	pieces []byte
	author string    // who announced it first
	who    []*member // that hold it, maxKept at most
}

// contests says whether x, which announces other hashes than the segment's, is kept
// from being believed: of two that contradict each other the first is. But not by one
// that has found out that its author was wrong or its holders send bad pieces, nor
// rather than the one that this tracker sent to the registry, as long as nobody has had
// the segment by the first hashes, which may be anybody's.
func (m *Machine) contests(i int, x *member) bool {
	s := &m.segs[i]
	sent := func(o *member) bool { return o.sent }
	overrules := x.sent && len(s.relays) == 0 && !slices.ContainsFunc(s.origins, sent)
	return s.holders() > 0 && !m.barred(i, x) && !overrules
}

// keep notes that x announced a segment by other hashes than the current ones.
func (m *Machine) keep(i int, pieces []byte, author string, x *member) {
	m.contested = true
	s := &m.segs[i]
	s.withdraw(x)
	for k := range s.versions {
		v := &s.versions[k]
		if string(v.pieces) != string(pieces) {
			continue
		}
		if len(v.who) < maxKept {
			v.who = append(v.who, x)
		}
		return
	}
	if len(s.versions) < maxVersions {
		s.versions = append(s.versions, version{slices.Clone(pieces), author, []*member{x}})
	}
}

// withdraw forgets what x said of the segment but for the current version.
func (s *segment) withdraw(x *member) {
	for k := range s.versions {
		s.versions[k].who = remove(s.versions[k].who, x)
	}
	s.versions = slices.DeleteFunc(s.versions, func(v version) bool { return len(v.who) == 0 })
}

// take removes a version and returns it; one without author if there is none.
func (s *segment) take(pieces []byte) (v version) {
	for k := range s.versions {
		if string(s.versions[k].pieces) == string(pieces) {
			v = s.versions[k]
			s.versions = slices.Delete(s.versions, k, k+1)
			break
		}
	}
	return v
}

// takers are the members that may have bytes by hashes of that author: they know
// segments by them, or did until those were superseded, and have not thrown away all
// they had since, nor found out that they have the whole blob. One that is shut out goes
// its own way with what it has.
func (m *Machine) takers(author string) []*member {
	var takers []*member
	for _, z := range m.list {
		knows := func() bool {
			for i := range m.segs {
				if m.segs[i].author == author && z.knows[i] && !m.apart(i, z) {
					return true
				}
			}
			return false
		}
		if z.name != author && !z.whole && !z.banned && (slices.Contains(z.took, author) || knows()) {
			takers = append(takers, z)
		}
	}
	return takers
}

// wrong is who is to blame for the wrong blob of x: the authors of hashes that the one
// who was sent to the registry has contradicted, else of those that it knows; of several
// the one that is blamed already, and rather such as have blamed nobody: these have gone
// on behind the bytes of one that was wrong.
func (m *Machine) wrong(x *member) []string {
	authors := x.took
	if len(authors) == 0 {
		for i := range m.segs {
			name := m.segs[i].author
			known := len(m.bad[name]) > 0
			if x.knows[i] && name != x.name && !slices.Contains(authors, name) && (known || !x.suspect) {
				authors = append(authors, name)
			}
		}
	}
	if silent := slices.DeleteFunc(slices.Clone(authors), m.reported); len(silent) > 0 {
		return silent
	}
	return authors
}

// supersede makes the current version of a segment one of the others. If that is
// because somebody was sent to the registry, whoever has bytes may have them by hashes
// that are wrong.
func (m *Machine) supersede(i int, sent bool) {
	s := &m.segs[i]
	pieces, author := s.pieces, s.author
	holders := append(slices.Clone(s.origins), s.relays...)
	for _, z := range m.list { // what these have may be by the former
		if sent && !z.whole && z.knows[i] && z.name != author && (z.present > 0 || z.has[i]) && !m.apart(i, z) {
			z.suspect = true
			if len(z.took) < maxTook && !slices.Contains(z.took, author) {
				z.took = append(z.took, author)
			}
		}
	}
	m.reset(i)
	for _, y := range holders[:min(len(holders), maxKept)] {
		m.keep(i, pieces, author, y)
	}
}

// renounce forgets a segment whose author is shut out or takes it back, but for members
// that do not have it from there: they will not announce it again. Nor will one that
// was sent to the registry for all, which is not told to throw anything away: what it said
// counts again when it has the whole blob.
func (m *Machine) renounce(now time.Time, i int) {
	s := &m.segs[i]
	pieces, author := s.pieces, s.author
	var own []*member
	for _, y := range append(slices.Clone(s.origins), s.relays...) {
		switch {
		case y.name == author:
		case y.whole || m.apart(i, y):
			own = append(own, y)
		case y.sent && y.fetchesAll():
			if y.forgot == nil {
				y.forgot = map[int][]byte{}
			}
			y.forgot[i] = pieces
		}
	}
	m.reset(i)
	for _, y := range own {
		if s.pieces == nil {
			s.begin(pieces, y.name)
		}
		m.hold(now, i, y)
	}
}

// recall takes what was forgotten of x, which has found out that it has the whole blob,
// for said again.
func (m *Machine) recall(now time.Time, x *member) {
	for i := range m.segs {
		if pieces := x.forgot[i]; pieces != nil {
			x.given[i] = nil // it has it from the registry, whomever it was shown since
			m.announce(now, x, &api.Announce{Segment: uint32(i), Pieces: pieces})
		}
	}
	x.forgot = nil
}

// apart says whether nothing that x has is from the author of segment i: x has
// reported it, has thrown its bytes away, and was told nothing of it since.
func (m *Machine) apart(i int, x *member) bool { return x.anew && m.tainted(i, x) }

// restore makes another version current of every segment that nobody holds any more:
// the one that most hold.
func (m *Machine) restore(now time.Time) {
	if !m.contested {
		return
	}
	for i := range m.segs {
		s := &m.segs[i]
		if s.holders() > 0 || len(s.versions) == 0 {
			continue
		}
		s.versions = slices.DeleteFunc(s.versions, func(v version) bool { return m.banned(v.author) })
		var best version
		for _, v := range s.versions {
			if len(v.who) > len(best.who) {
				best = v
			}
		}
		if len(best.who) > 0 {
			m.announce(now, best.who[0], &api.Announce{Segment: uint32(i), Pieces: best.pieces})
		}
	}
}

// witness takes the word of x, if it has the whole blob, against those who said
// otherwise of a segment; but not of one of whose hashes another says that they were
// wrong.
func (m *Machine) witness(now time.Time, i int, x *member) {
	s := &m.segs[i]
	if !x.whole || len(s.versions) == 0 || len(m.refuted[x.name]) > 0 {
		return
	}
	own := s.author
	var others []string
	if !x.has[i] {
		at := slices.IndexFunc(s.versions, func(v version) bool { return slices.Contains(v.who, x) })
		if at < 0 {
			return
		}
		own = s.versions[at].author
		if s.holders() > 0 {
			others = append(others, s.author)
		}
	}
	for _, v := range s.versions {
		others = append(others, v.author)
	}
	deceived := func(name string) bool {
		y := m.members[name]
		return y != nil && y.suspect && len(m.refuted[name]) == 0
	}
	for _, name := range others {
		if name != own && name != x.name && !m.banned(name) && !deceived(name) {
			m.blame(now, x, name, otherHashes)
		}
	}
}

// witnesses is witness for all that are known to hold a segment, until the others
// are shut out.
func (m *Machine) witnesses(now time.Time, i int) {
	s := &m.segs[i]
	if len(s.versions) == 0 {
		return
	}
	holders := append(slices.Clone(s.origins), s.relays...)
	for _, v := range s.versions {
		holders = append(holders, v.who...)
	}
	for _, x := range holders {
		if !x.banned {
			m.witness(now, i, x)
		}
	}
}

// accuse is told by x of whom it was sent pieces that did not have their hashes. That
// counts against those that have announced the segment by the same hashes. Others may
// have bytes of the registry, and be about to find out that the hashes are wrong.
func (m *Machine) accuse(now time.Time, x *member, bad *api.BadPieces) {
	if uint64(bad.GetSegment()) >= uint64(len(m.segs)) {
		return
	}
	i := int(bad.GetSegment())
	names := bad.GetPeers()
	for _, name := range names[:min(len(names), maxGiven)] {
		y := m.members[name]
		if y != nil && y != x && met(x, y) && m.segs[i].vouches(y, bad.GetPieces()) {
			m.spoils(now, x, y)
		}
	}
}

// spoils counts the word of x that y sent it bad pieces: x takes nothing of y any more,
// and on a second one's word nobody does. What y announced stays, where others hold it:
// the hashes may be right, and those that took pieces by them checked them.
func (m *Machine) spoils(now time.Time, x, y *member) {
	by := m.spoilt[y.name]
	if x.banned || y.banned || slices.Contains(by, x.name) || m.badPairs >= maxBad {
		return
	}
	m.badPairs++
	m.spoilt[y.name] = append(by, x.name)
	if !m.banned(y.name) {
		m.name(y.name, wrongPieces+", says one")
		m.part(now, x, y)
		return
	}
	m.castOut(y, wrongPieces)
	m.sort(now, y)
	m.unhold(now, y)
	m.bequeath(y)
	m.disown(now, y)
}

// bequeath makes others the authors of what x, which holds nothing any more, was the
// author of, rather such as do not have it from the swarm. What nobody else holds is
// forgotten.
func (m *Machine) bequeath(x *member) {
	for i := range m.segs {
		s := &m.segs[i]
		for k := range s.versions {
			if v := &s.versions[k]; v.author == x.name {
				v.author = v.who[0].name
			}
		}
		switch {
		case s.author != x.name:
		case len(s.origins) > 0:
			s.author = s.origins[0].name
		case len(s.relays) > 0:
			s.author = s.relays[0].name
		default:
			m.reset(i)
		}
	}
}

// barred says whether x can take segment i from none of those that hold it, nor from one
// that is to have it from them: by its hashes it is not to have it, or all of them have
// sent it bad pieces.
func (m *Machine) barred(i int, x *member) bool {
	if m.tainted(i, x) {
		return true
	}
	s := &m.segs[i]
	if len(m.spoilt) == 0 || s.holders() == 0 {
		return false
	}
	takes := func(y *member) bool { return !m.shuns(x, y) }
	if slices.ContainsFunc(s.origins, takes) || slices.ContainsFunc(s.relays, takes) {
		return false
	}
	hop := m.workingHop(i)
	return hop == nil || hop == x || m.shuns(x, hop)
}

// vouches says whether x holds the segment by those hashes.
func (s *segment) vouches(x *member, pieces []byte) bool {
	if string(s.pieces) == string(pieces) {
		return slices.Contains(s.origins, x) || slices.Contains(s.relays, x)
	}
	return slices.ContainsFunc(s.versions, func(v version) bool {
		return string(v.pieces) == string(pieces) && slices.Contains(v.who, x)
	})
}

// met says whether one of two members was told of the other.
func met(x, y *member) bool {
	for i := range x.given {
		if slices.Contains(x.given[i], y) || slices.Contains(y.given[i], x) {
			return true
		}
	}
	return false
}

// expel shuts a member out for good for what no honest one does.
func (m *Machine) expel(now time.Time, x *member, reason string) {
	if len(m.expelled) < maxBad {
		m.expelled[x.name] = true
	}
	m.castOut(x, reason)
	m.sort(now, x)
	m.disown(now, x)
}
